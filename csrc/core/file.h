// The spill's file: nameless from the start, mode 0600, O_DIRECT where the file system takes it.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace offload {

// What a directory can keep of the project's promises.
struct DirectoryFacts {
  std::string path;
  std::string filesystem;  // "ext4", "tmpfs", "nfs", or the magic number in hex
  std::string backing;     // "disk", "memory" or "network"
  std::uint64_t free_bytes = 0;
  std::uint64_t total_bytes = 0;
  bool direct = false;
  std::string direct_reason;
};

// Throws IoError for a path that is missing, no directory, or not writable.
DirectoryFacts inspect_directory(const std::string& path);

class SpillFile {
 public:
  // Throws IoError as inspect_directory does, and with EOPNOTSUPP on a network file system.
  SpillFile(const std::string& directory, bool want_direct);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  // Reserves [offset, offset + nbytes); returns 0 or the errno, EBADF once closed.
  int reserve(std::uint64_t offset, std::uint64_t nbytes);
  // Gives the descriptor back, and with it all space. Nothing may be in flight.
  void close();
  // What the file system has left for us; 0 if it does not say, once closed, and in a
  // forked child.
  std::uint64_t free_bytes() const;
  // Bytes of this file that lie in the page cache: 0 under O_DIRECT or once closed.
  std::uint64_t page_cache_bytes() const;

  // -1 once closed. Not for use beside close() on another thread.
  int fd() const { return fd_; }
  bool direct() const { return facts_.direct; }
  // Addresses, offsets and lengths must be multiples of this.
  std::uint32_t alignment() const { return alignment_; }
  const DirectoryFacts& facts() const { return facts_; }
  // For messages; the file itself has no name.
  const std::string& path() const { return path_; }

 private:
  DirectoryFacts facts_;
  std::string path_;
  // close() on one thread must not hand the descriptor's number to another file while a second
  // thread asks about it.
  mutable std::mutex mutex_;
  int fd_ = -1;
  int fork_generation_;
  std::uint32_t alignment_ = 1;
  std::uint64_t reserved_ = 0;
};

}  // namespace offload
