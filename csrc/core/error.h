// The one exception of the I/O core: what was attempted, where, and the errno that came back.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace offload {

class IoError : public std::runtime_error {
 public:
  IoError(int code, const std::string& message, std::string path)
      : std::runtime_error(message), code_(code), path_(std::move(path)) {}

  int code() const { return code_; }
  const std::string& path() const { return path_; }

 private:
  int code_;
  std::string path_;
};

inline IoError io_error(int code, const std::string& op, const std::string& path,
                        std::uint64_t offset, std::uint64_t nbytes) {
  return IoError(code,
                 op + " of " + std::to_string(nbytes) + " bytes at offset " +
                     std::to_string(offset) + " failed: " + std::strerror(code),
                 path);
}

// A thread for I/O, or an IoError where the system refuses one (a process limit, a cgroup).
template <typename Work>
std::thread start_thread(Work work, const std::string& path) {
  try {
    return std::thread(std::move(work));
  } catch (const std::system_error& error) {
    throw IoError(error.code().value(), "the system refuses a thread for I/O", path);
  }
}

// A file system has no room left for us in four ways, and all mean: keep the bytes in memory.
inline bool is_no_space(int code) { return code == ENOSPC || code == EDQUOT || code == EFBIG; }

}  // namespace offload
