// How the kernels of tokens are written: for one thread block, as phases. A phase is a loop over
// the block's threads, and a barrier ends it. On a GPU the loop is the threads themselves; with
// g++ a test runs one thread after the other, in whatever order: what a thread reads must have been
// written in an earlier phase, or by itself.
//
// A block has `each_thread(phase)`, which calls phase(thread, state) for each of kBlockThreads;
// the state is the thread's own and stays from phase to phase, in registers where there are some.
#pragma once

#if defined(__CUDACC__)
#define OFFLOAD_KERNEL __device__ __forceinline__
// Registers have no numbers that a program could compute: loops over them have to vanish.
#define OFFLOAD_UNROLL _Pragma("unroll")
#else
#define OFFLOAD_KERNEL inline
#define OFFLOAD_UNROLL
#endif

namespace offload {

inline constexpr unsigned kBlockThreads = 256;

// How many thread blocks there are, and which of them one is.
struct Grid {
  unsigned x, y, z;
};

#if defined(__CUDACC__)
template <typename State>
struct GpuBlock {
  State state;

  template <typename Phase>
  __device__ __forceinline__ void each_thread(const Phase& phase) {
    phase(threadIdx.x, state);
    __syncthreads();
  }
};

__device__ __forceinline__ Grid this_block() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
#endif

}  // namespace offload
