// What an attention over blocks is of: for the kernels of both compilers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// Numbers of blocks, [batch, count], ascending; the last block of a sequence may be shorter.
struct Blocks {
  const std::int32_t* numbers = nullptr;
  std::size_t count = 0;
};

struct AttentionShape {
  std::size_t batch = 0;
  std::size_t heads = 0;
  std::size_t key_heads = 0;  // divides `heads`: shared by groups
  std::size_t length = 0;
  std::size_t channels = 0;
  std::size_t block_tokens = 0;
  float scale = 1;
  // [batch, length] or null: tokens see those of their own document alone.
  const std::int32_t* documents = nullptr;
  // How many tokens each sees at most, itself included; 0: all before it.
  std::size_t window = 0;
};

}  // namespace offload
