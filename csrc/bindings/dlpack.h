// Host memory as a DLPack capsule: how a tensor of any framework is laid over bytes of ours. One
// call gives address, dtype, shape and strides, where the buffer protocol needs a view on top.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace offload::dlpack {

// The stable C structures of DLPack 0.x (dlpack.h of dmlc/dlpack), which every consumer accepts.
struct Device {
  std::int32_t type = 1;  // kDLCPU
  std::int32_t id = 0;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes = 1;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset = 0;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

inline constexpr const char* kUnused = "dltensor";  // a consumer renames the capsule it took

// What a capsule keeps alive: the sizes and strides it points to, and the memory, by `owner`.
struct Layout {
  Managed managed;
  std::vector<std::int64_t> sizes_and_strides;
  std::shared_ptr<void> owner;
};

// How far from its first byte a tensor reaches.
inline std::uint64_t span_bytes(const std::vector<std::int64_t>& sizes_and_strides, unsigned bits) {
  const std::size_t ndim = sizes_and_strides.size() / 2;
  std::uint64_t last = 0;
  for (std::size_t dim = 0; dim < ndim; ++dim) {
    const std::int64_t size = sizes_and_strides[dim];
    const std::int64_t stride = sizes_and_strides[ndim + dim];
    if (size < 0 || stride < 0) throw std::invalid_argument("a size or stride is negative");
    if (size == 0) return 0;
    std::uint64_t step = 0;
    if (__builtin_mul_overflow(static_cast<std::uint64_t>(size - 1),
                               static_cast<std::uint64_t>(stride), &step) ||
        __builtin_add_overflow(last, step, &last) || last >> 56) {
      throw std::invalid_argument("sizes and strides are too large");
    }
  }
  return (last + 1) * bits / 8;
}

// A new reference to a capsule over [data, data + nbytes), which `owner` keeps; strides count
// elements. nullptr with a Python error set where the system has no memory. Throws
// std::invalid_argument when the tensor reaches beyond its bytes.
inline PyObject* capsule(std::byte* data, std::uint64_t nbytes, std::shared_ptr<void> owner,
                         DataType dtype, std::vector<std::int64_t> sizes_and_strides) {
  if (span_bytes(sizes_and_strides, dtype.bits) > nbytes) {
    throw std::invalid_argument("the tensor reaches beyond the " + std::to_string(nbytes) +
                                " bytes that are here");
  }
  const std::size_t ndim = sizes_and_strides.size() / 2;
  auto layout = std::make_unique<Layout>();
  layout->sizes_and_strides = std::move(sizes_and_strides);
  layout->owner = std::move(owner);
  std::int64_t* sizes = layout->sizes_and_strides.data();
  layout->managed = {{data, {}, static_cast<std::int32_t>(ndim), dtype, sizes, sizes + ndim},
                     layout.get(),
                     [](Managed* self) { delete static_cast<Layout*>(self->context); }};
  PyObject* made = PyCapsule_New(&layout->managed, kUnused, [](PyObject* object) {
    if (!PyCapsule_IsValid(object, kUnused)) return;  // taken: its consumer calls the deleter
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(object, kUnused));
    unused->deleter(unused);
  });
  if (made != nullptr) [[maybe_unused]]
    Layout* kept = layout.release();
  return made;
}

}  // namespace offload::dlpack
