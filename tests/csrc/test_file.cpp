// SpillFile: no name, nobody else's eyes, and the truth about what the directory can do.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <vector>

#include "align.h"
#include "arena.h"
#include "check.h"
#include "error.h"
#include "file.h"

using namespace offload;

namespace {

int code_of(const auto& action) {
  try {
    action();
  } catch (const IoError& error) {
    return error.code();
  }
  return 0;
}

void the_file_has_no_name_and_mode_0600() {
  const check::Directory directory;
  const mode_t before = ::umask(0);
  const SpillFile file(directory.path, true);
  ::umask(before);
  CHECK(std::filesystem::is_empty(directory.path));
  struct stat facts{};
  CHECK_EQ(::fstat(file.fd(), &facts), 0);
  CHECK_EQ(facts.st_mode & 07777, 0600u);
  CHECK_EQ(facts.st_nlink, 0u);
  CHECK_EQ(facts.st_size, 0);
  CHECK(::fcntl(file.fd(), F_GETFD) & FD_CLOEXEC);
  CHECK_EQ((::fcntl(file.fd(), F_GETFL) & O_DIRECT) != 0, file.direct());
}

void the_space_is_free_again_when_the_file_closes() {
  const check::Directory directory;
  struct stat facts{};
  int fd = -1;
  {
    SpillFile file(directory.path, true);
    fd = file.fd();
    CHECK_EQ(file.reserve(0, 1 << 20), 0);
    CHECK_EQ(file.reserve(1 << 20, 1 << 20), 0);
    ::fstat(fd, &facts);
    CHECK_EQ(facts.st_size, 2 << 20);
  }
  CHECK(::fcntl(fd, F_GETFD) < 0);
}

void a_closed_file_answers_without_its_descriptor() {
  const check::Directory directory;
  SpillFile file(directory.path, false);
  const int fd = file.fd();
  CHECK_EQ(file.reserve(0, 1 << 20), 0);
  file.close();
  CHECK(::fcntl(fd, F_GETFD) < 0);
  CHECK_EQ(file.fd(), -1);
  CHECK_EQ(file.reserve(0, 1 << 20), EBADF);
  CHECK_EQ(file.free_bytes(), 0u);
  CHECK_EQ(file.page_cache_bytes(), 0u);
  const int next = ::dup(STDERR_FILENO);  // gets the number just freed
  file.close();
  CHECK(::fcntl(next, F_GETFD) >= 0);
  ::close(next);
}

void direct_is_used_only_when_asked_for() {
  const check::Directory directory;
  const SpillFile buffered(directory.path, false);
  CHECK(!buffered.direct());
  CHECK_EQ(buffered.alignment(), 1u);
  CHECK_EQ(buffered.facts().direct_reason, std::string("not asked for"));
  const SpillFile file(directory.path, true);
  CHECK(!file.facts().direct_reason.empty());
  if (file.direct()) CHECK(file.alignment() >= 512 && file.alignment() <= kPageBytes);
}

void the_page_cache_holds_buffered_bytes_only() {
  const check::Directory directory;
  const HostMapping page(kPageBytes);
  std::memset(page.data(), 1, kPageBytes);
  for (const bool direct : {true, false}) {
    SpillFile file(directory.path, direct);
    CHECK_EQ(file.page_cache_bytes(), 0u);
    CHECK_EQ(file.reserve(0, 1 << 20), 0);
    CHECK_EQ(::pwrite(file.fd(), page.data(), kPageBytes, 0), ssize_t(kPageBytes));
    CHECK_EQ(file.page_cache_bytes(), file.direct() ? 0 : kPageBytes);
  }
}

void directories_that_cannot_serve_are_refused_by_errno() {
  const check::Directory directory;
  const std::string missing = directory.path + "/missing";
  const std::string plain = directory.path + "/plain";
  std::ofstream(plain) << "x";
  CHECK_EQ(code_of([&] { SpillFile(missing, true); }), ENOENT);
  CHECK_EQ(code_of([&] { SpillFile(plain, true); }), ENOTDIR);
  CHECK_EQ(code_of([&] { inspect_directory(missing); }), ENOENT);
  CHECK_EQ(code_of([&] { inspect_directory(plain); }), ENOTDIR);
  CHECK_EQ(code_of([&] { SpillFile("/proc", true); }) != 0, true);
  if (::geteuid() != 0) {
    std::filesystem::permissions(directory.path, std::filesystem::perms::owner_read);
    CHECK_EQ(code_of([&] { SpillFile(directory.path, true); }), EACCES);
    std::filesystem::permissions(directory.path, std::filesystem::perms::owner_all);
  }
}

void memory_is_told_from_disk() {
  struct statfs system{};
  if (::statfs("/dev/shm", &system) != 0 || system.f_type != 0x01021994) return;
  const DirectoryFacts facts = inspect_directory("/dev/shm");
  CHECK_EQ(facts.filesystem, std::string("tmpfs"));
  CHECK_EQ(facts.backing, std::string("memory"));
}

void inspection_leaves_nothing_and_counts_the_space() {
  const check::Directory directory;
  const DirectoryFacts facts = inspect_directory(directory.path);
  CHECK(std::filesystem::is_empty(directory.path));
  CHECK(facts.free_bytes > 0 && facts.free_bytes <= facts.total_bytes);
  CHECK_EQ(facts.path, directory.path);
}

void a_file_size_limit_is_reported_as_an_errno() {
  const check::Directory directory;
  SpillFile file(directory.path, true);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit tight{1 << 20, before.rlim_max};
  ::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &tight);
  const int within = file.reserve(0, 1 << 20);
  const int beyond = file.reserve(1 << 20, 4096);
  ::setrlimit(RLIMIT_FSIZE, &before);
  CHECK_EQ(within, 0);
  CHECK_EQ(beyond, EFBIG);
  CHECK(is_no_space(beyond));
}

}  // namespace

int main() {
  the_file_has_no_name_and_mode_0600();
  the_space_is_free_again_when_the_file_closes();
  a_closed_file_answers_without_its_descriptor();
  direct_is_used_only_when_asked_for();
  the_page_cache_holds_buffered_bytes_only();
  directories_that_cannot_serve_are_refused_by_errno();
  memory_is_told_from_disk();
  inspection_leaves_nothing_and_counts_the_space();
  a_file_size_limit_is_reported_as_an_errno();
  return check::status();
}
