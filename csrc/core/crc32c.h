// CRC32C (Castagnoli), as in iSCSI, ext4 and btrfs: polynomial 0x1EDC6F41, reflected.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// Continue `crc` (0 to begin) over `nbytes` at `data`.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t nbytes);

// The same while copying to `dst`, in one pass over memory; the stores bypass the cache, because
// the next reader of `dst` is the drive.
std::uint32_t copy_crc32c(std::uint32_t crc, void* dst, const void* src, std::size_t nbytes);

// Copies as copy_crc32c does, without the checksum.
void copy_stream(void* dst, const void* src, std::size_t nbytes);

// "avx512-vpclmulqdq", "sse4.2" or "table": which version this processor runs.
const char* crc32c_path();

// Versions by name, so that a test can compare those this processor has; nullptr if it has not.
using Crc32cFunction = std::uint32_t (*)(std::uint32_t crc, const void* data, std::size_t nbytes);
Crc32cFunction crc32c_version(const char* path);

// The table version, which defines the result.
std::uint32_t crc32c_table(std::uint32_t crc, const void* data, std::size_t nbytes);

}  // namespace offload
