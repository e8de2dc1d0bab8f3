#include "attention.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "../core/block_attention.h"

namespace py = pybind11;

namespace offload {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
// An address, then strides of batch, head and row in floats.
using Array = std::array<std::int64_t, 4>;

template <typename T>
Heads<T> heads_of(const Array& array) {
  return {reinterpret_cast<T*>(array[0]), array[1], array[2], array[3]};
}

Blocks blocks_of(std::uintptr_t numbers, std::size_t count) {
  return {reinterpret_cast<const std::int32_t*>(numbers), count};
}

AttentionShape shape_of(std::size_t batch, std::size_t heads, std::size_t key_heads,
                        std::size_t length, std::size_t channels, std::size_t block_tokens,
                        float scale, std::uintptr_t documents, std::size_t window) {
  if (key_heads == 0 || heads % key_heads != 0) {
    throw std::invalid_argument("heads must be a multiple of key_heads");
  }
  if (block_tokens == 0) throw std::invalid_argument("block_tokens must be at least 1");
  return {batch,    heads,        key_heads, length,
          channels, block_tokens, scale,     reinterpret_cast<const std::int32_t*>(documents),
          window};
}

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<AttentionShape>(module, "AttentionShape")
      .def(py::init(&shape_of), py::kw_only(), py::arg("batch"), py::arg("heads"),
           py::arg("key_heads"), py::arg("length"), py::arg("channels"), py::arg("block_tokens"),
           py::arg("scale"), py::arg("documents") = 0, py::arg("window") = 0);
  module.def(
      "block_attention",
      [](ThreadPool& pool, const AttentionShape& shape, std::uintptr_t rows, std::size_t row_count,
         std::uintptr_t columns, std::size_t column_count, const Array& query, const Array& key,
         const Array& value, const Array& out, std::uintptr_t lse) {
        block_attention(pool, shape, blocks_of(rows, row_count), blocks_of(columns, column_count),
                        heads_of<const float>(query), heads_of<const float>(key),
                        heads_of<const float>(value), heads_of<float>(out),
                        reinterpret_cast<float*>(lse));
      },
      NoGil());
  module.def(
      "block_attention_backward",
      [](ThreadPool& pool, const AttentionShape& shape, std::uintptr_t rows, std::size_t row_count,
         std::uintptr_t columns, std::size_t column_count, const Array& query, const Array& key,
         const Array& value, const Array& out, std::uintptr_t lse, const Array& grad_out,
         const Array& grad_query, const Array& grad_key, const Array& grad_value) {
        block_attention_backward(pool, shape, blocks_of(rows, row_count),
                                 blocks_of(columns, column_count), heads_of<const float>(query),
                                 heads_of<const float>(key), heads_of<const float>(value),
                                 heads_of<const float>(out), reinterpret_cast<const float*>(lse),
                                 heads_of<const float>(grad_out), heads_of<float>(grad_query),
                                 heads_of<float>(grad_key), heads_of<float>(grad_value));
      },
      NoGil());
  module.def(
      "block_pair_scores",
      [](ThreadPool& pool, const AttentionShape& shape, bool ahead, const Array& query,
         const Array& key, std::uintptr_t scores) {
        block_pair_scores(pool, shape, ahead, heads_of<const float>(query),
                          heads_of<const float>(key), reinterpret_cast<float*>(scores));
      },
      NoGil());
}

}  // namespace offload
