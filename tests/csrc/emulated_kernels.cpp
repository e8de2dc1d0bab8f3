// The C interface of csrc/cuda/entry.cu over the emulated grid: a library by which Python's side of
// the kernels of tokens is tested without a GPU, from autograd down to the arrays' layout.
#include "emulated_grid.h"

using offload::BlockAttentionArrays;
using offload::KeptRowsArrays;

namespace {

constexpr unsigned kSeed = 1;

}  // namespace

extern "C" {

int offload_block_attention(const void* arrays, void*) {
  return emulated::block_attention(*static_cast<const BlockAttentionArrays*>(arrays), kSeed);
}

int offload_block_attention_backward(const void* arrays, void*) {
  return emulated::block_attention_backward(*static_cast<const BlockAttentionArrays*>(arrays),
                                            kSeed);
}

int offload_block_pair_scores(const void* arrays, int ahead, void*) {
  return emulated::block_pair_scores(*static_cast<const BlockAttentionArrays*>(arrays), ahead != 0,
                                     kSeed);
}

std::size_t offload_attention_bytes() { return sizeof(BlockAttentionArrays); }

std::size_t offload_attention_most_channels() { return offload::kMostChannels; }

int offload_add_kept_rows(const void* arrays, void*) {
  return emulated::add_kept_rows(*static_cast<const KeptRowsArrays*>(arrays), kSeed);
}

int offload_take_kept_rows(const void* arrays, void*) {
  return emulated::take_kept_rows(*static_cast<const KeptRowsArrays*>(arrays), kSeed);
}

std::size_t offload_kept_rows_bytes() { return sizeof(KeptRowsArrays); }

const char* offload_cuda_error(int code) { return code == 0 ? "" : "cudaErrorInvalidValue"; }
}
