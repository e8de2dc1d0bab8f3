#include "file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include "align.h"
#include "error.h"
#include "fork_guard.h"

namespace offload {
namespace {

struct KnownFileSystem {
  std::uint32_t magic;
  const char* name;
  const char* backing;
};

// statfs(2). A network file system keeps an unlinked file under another name on the server (NFS's
// .nfsXXXX, FUSE's .fuse_hidden), so a killed job would leave it there.
constexpr std::array kKnown = {
    KnownFileSystem{0xEF53, "ext4", "disk"},
    KnownFileSystem{0x58465342, "xfs", "disk"},
    KnownFileSystem{0x9123683E, "btrfs", "disk"},
    KnownFileSystem{0xF2F52010, "f2fs", "disk"},
    KnownFileSystem{0x2FC12FC1, "zfs", "disk"},
    KnownFileSystem{0x794C7630, "overlayfs", "disk"},
    KnownFileSystem{0x01021994, "tmpfs", "memory"},
    KnownFileSystem{0x858458F6, "ramfs", "memory"},
    KnownFileSystem{0x958458F6, "hugetlbfs", "memory"},
    KnownFileSystem{0x6969, "nfs", "network"},
    KnownFileSystem{0x517B, "smb", "network"},
    KnownFileSystem{0xFE534D42, "smb2", "network"},
    KnownFileSystem{0xFF534D42, "cifs", "network"},
    KnownFileSystem{0x01021997, "9p", "network"},
    KnownFileSystem{0x65735546, "fuse", "network"},
    KnownFileSystem{0x5346414F, "afs", "network"},
    KnownFileSystem{0x73757245, "coda", "network"},
    KnownFileSystem{0x0BD00BD0, "lustre", "network"},
    KnownFileSystem{0x00C36400, "ceph", "network"},
    KnownFileSystem{0x47504653, "gpfs", "network"},
    KnownFileSystem{0x19830326, "beegfs", "network"},
    KnownFileSystem{0x6B414653, "afs", "network"},
    KnownFileSystem{0x7461636F, "ocfs2", "network"},
    KnownFileSystem{0x01161970, "gfs2", "network"},
    KnownFileSystem{0xAAD7AAEA, "panfs", "network"},
    KnownFileSystem{0x786F4256, "vboxsf", "network"},
};

int create_nameless(const std::string& directory, int flags) {
  constexpr mode_t kOwnerOnly = S_IRUSR | S_IWUSR;
  const int fd = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | flags, kOwnerOnly);
  // EISDIR is how kernels and file systems without O_TMPFILE answer.
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return fd;
  std::string name = directory + "/.offload-XXXXXX";
  std::vector<char> buffer(name.c_str(), name.c_str() + name.size() + 1);
  const int named = ::mkostemp(buffer.data(), O_CLOEXEC | flags);
  if (named >= 0) ::unlink(buffer.data());
  return named;
}

int open_nameless(const std::string& directory, int flags) {
  return open_here([&] { return create_nameless(directory, flags); });
}

std::uint32_t direct_alignment(int fd) {
  struct statx facts{};
#ifdef STATX_DIOALIGN
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 &&
      (facts.stx_mask & STATX_DIOALIGN) && facts.stx_dio_offset_align != 0) {
    return std::max({facts.stx_dio_offset_align, facts.stx_dio_mem_align, std::uint32_t{512}});
  }
#else
  (void)fd, (void)facts;
#endif
  return kPageBytes;
}

// O_DIRECT may be accepted by open and refused by the first transfer, so one page goes there and
// back.
int try_direct(int fd) {
  void* page = nullptr;
  if (::posix_memalign(&page, kPageBytes, kPageBytes) != 0) return ENOMEM;
  std::fill_n(static_cast<char*>(page), kPageBytes, char{0});
  int code = 0;
  if (::pwrite(fd, page, kPageBytes, 0) != static_cast<ssize_t>(kPageBytes) ||
      ::pread(fd, page, kPageBytes, 0) != static_cast<ssize_t>(kPageBytes)) {
    code = errno != 0 ? errno : EIO;
  }
  if (::ftruncate(fd, 0) != 0 && code == 0) code = errno;
  std::free(page);
  return code;
}

struct Opened {
  int fd;
  bool direct;
  std::string reason;
};

Opened open_best(const std::string& directory, bool want_direct) {
  std::string reason = "not asked for";
  if (want_direct) {
    const int fd = open_nameless(directory, O_DIRECT);
    if (fd >= 0) {
      const int code = try_direct(fd);
      if (code == 0) return {fd, true, "a page was written and read past the page cache"};
      close_here(fd);
      if (is_no_space(code)) throw io_error(code, "write", directory, 0, kPageBytes);
      reason = std::string("the first direct transfer failed: ") + std::strerror(code);
    } else if (errno == EINVAL) {
      reason = "the file system refuses O_DIRECT";
    } else {
      throw IoError(errno, std::string("cannot create a spill file: ") + std::strerror(errno),
                    directory);
    }
  }
  const int fd = open_nameless(directory, 0);
  if (fd < 0) {
    throw IoError(errno, std::string("cannot create a spill file: ") + std::strerror(errno),
                  directory);
  }
  return {fd, false, reason};
}

// cachestat(2) of Linux 6.5, which headers of 2023 do not have. nullopt where the kernel is older.
std::optional<std::uint64_t> ask_kernel(int fd, std::uint64_t nbytes) {
  constexpr long kCachestat = 451;
  struct Range {
    std::uint64_t offset, nbytes;
  } range{0, nbytes};
  struct Answer {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } answer{};
  if (::syscall(kCachestat, fd, &range, &answer, 0u) != 0) return std::nullopt;
  return answer.cached * kPageBytes;
}

std::uint64_t unit_bytes(const struct statfs& system) {
  return static_cast<std::uint64_t>(system.f_frsize ? system.f_frsize : system.f_bsize);
}

DirectoryFacts classify(const std::string& path) {
  struct stat entry{};
  if (::stat(path.c_str(), &entry) != 0) {
    const std::string advice = errno == ENOENT ? "; create it with mkdir -p" : "";
    throw IoError(errno, std::strerror(errno) + advice, path);
  }
  if (!S_ISDIR(entry.st_mode)) throw IoError(ENOTDIR, std::strerror(ENOTDIR), path);
  if (::access(path.c_str(), W_OK | X_OK) != 0) {
    throw IoError(errno, std::string("not writable: ") + std::strerror(errno), path);
  }
  struct statfs system{};
  if (::statfs(path.c_str(), &system) != 0) throw IoError(errno, std::strerror(errno), path);
  DirectoryFacts facts;
  facts.path = path;
  const auto magic = static_cast<std::uint32_t>(system.f_type);
  const auto known = std::find_if(kKnown.begin(), kKnown.end(),
                                  [&](const auto& entry) { return entry.magic == magic; });
  if (known != kKnown.end()) {
    facts.filesystem = known->name;
    facts.backing = known->backing;
  } else {
    char hex[32];
    std::snprintf(hex, sizeof hex, "0x%x", magic);
    facts.filesystem = hex;
    facts.backing = "disk";
  }
  facts.free_bytes = unit_bytes(system) * system.f_bavail;
  facts.total_bytes = unit_bytes(system) * system.f_blocks;
  return facts;
}

}  // namespace

DirectoryFacts inspect_directory(const std::string& path) {
  DirectoryFacts facts = classify(path);
  const Opened opened = open_best(path, true);
  facts.direct = opened.direct;
  facts.direct_reason = opened.reason;
  close_here(opened.fd);
  return facts;
}

SpillFile::SpillFile(const std::string& directory, bool want_direct)
    : facts_(classify(directory)),
      path_(directory + "/(nameless spill file)"),
      fork_generation_(fork_generation()) {
  if (facts_.backing == "network") {
    throw IoError(EOPNOTSUPP,
                  "a " + facts_.filesystem +
                      " directory would keep spill files of a killed job; choose a local disk",
                  directory);
  }
  Opened opened = open_best(directory, want_direct);
  fd_ = opened.fd;
  facts_.direct = opened.direct;
  facts_.direct_reason = std::move(opened.reason);
  if (facts_.direct) alignment_ = direct_alignment(fd_);
}

SpillFile::~SpillFile() {
  if (fork_generation_ == fork_generation()) close();
}

int SpillFile::reserve(std::uint64_t offset, std::uint64_t nbytes) {
  std::lock_guard lock(mutex_);
  int code = 0;
  do {
    code = ::fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes)) == 0 ? 0
                                                                                            : errno;
  } while (code == EINTR);
  // Without fallocate the space is claimed by writing; a full disk then shows in a completion.
  if (code == EOPNOTSUPP || code == ENOSYS) {
    code = ::ftruncate(fd_, static_cast<off_t>(offset + nbytes)) == 0 ? 0 : errno;
  }
  if (code == 0) {
    reserved_ = std::max(reserved_, offset + nbytes);
  } else {
    // What was found before the space ran out is of no use; should this fail too, it stays ours
    // until the file is closed.
    [[maybe_unused]] const int left = ::ftruncate(fd_, static_cast<off_t>(reserved_));
  }
  return code;
}

std::uint64_t SpillFile::free_bytes() const {
  if (fork_generation_ != fork_generation()) return 0;  // the mutex may be held by a lost thread
  std::lock_guard lock(mutex_);
  struct statfs system{};
  if (::fstatfs(fd_, &system) != 0) return 0;
  return unit_bytes(system) * system.f_bavail;
}

void SpillFile::close() {
  std::lock_guard lock(mutex_);
  reserved_ = 0;
  const int fd = std::exchange(fd_, -1);
  if (fd < 0) return;
  // A child that was forked past our handlers may hold the file open; it shall not hold the space.
  [[maybe_unused]] const int code = ::ftruncate(fd, 0);
  close_here(fd);
}

std::uint64_t SpillFile::page_cache_bytes() const {
  if (fork_generation_ != fork_generation()) return 0;
  std::lock_guard lock(mutex_);
  if (facts_.direct || reserved_ == 0) return 0;
  if (const auto counted = ask_kernel(fd_, reserved_)) return *counted;
  void* at = ::mmap(nullptr, reserved_, PROT_READ, MAP_SHARED, fd_, 0);
  if (at == MAP_FAILED) return 0;
  std::vector<unsigned char> present(align_up(reserved_, kPageBytes) / kPageBytes);
  std::uint64_t pages = 0;
  if (::mincore(at, reserved_, present.data()) == 0) {
    for (unsigned char page : present) pages += page & 1;
  }
  ::munmap(at, reserved_);
  return pages * kPageBytes;
}

}  // namespace offload
