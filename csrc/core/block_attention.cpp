#include "block_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"

// One source for all processors: what differs is how wide the loops' vectors are. The same sums in
// the same order, so that the bits are the same as well. Not under the thread sanitizer: its hooks
// are in the function that chooses a clone too, and that one runs before the sanitizer has begun.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define OFFLOAD_WIDE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define OFFLOAD_WIDE
#endif

namespace offload {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
// Sums and maxima of a row run in so many lanes, whatever a processor has: the order is the same.
constexpr std::size_t kLanes = 16;

// A tile's rows lie where they are, `stride` floats apart, or side by side in a buffer.
struct Tile {
  const float* data;
  std::ptrdiff_t stride;
};

// out[r][c] += sum over k of a[r][k] * b[k][c].
OFFLOAD_WIDE
void add_product(float* out, std::ptrdiff_t out_stride, Tile a, Tile b, std::size_t rows,
                 std::size_t inner, std::size_t columns) {
  for (std::size_t r = 0; r < rows; ++r) {
    float* to = out + static_cast<std::ptrdiff_t>(r) * out_stride;
    const float* from = a.data + static_cast<std::ptrdiff_t>(r) * a.stride;
    std::size_t k = 0;
    for (; k + 4 <= inner; k += 4) {
      const float* b0 = b.data + static_cast<std::ptrdiff_t>(k) * b.stride;
      const float* b1 = b0 + b.stride;
      const float* b2 = b1 + b.stride;
      const float* b3 = b2 + b.stride;
      const float a0 = from[k], a1 = from[k + 1], a2 = from[k + 2], a3 = from[k + 3];
      for (std::size_t c = 0; c < columns; ++c) {
        to[c] += (a0 * b0[c] + a1 * b1[c]) + (a2 * b2[c] + a3 * b3[c]);
      }
    }
    for (; k < inner; ++k) {
      const float* b0 = b.data + static_cast<std::ptrdiff_t>(k) * b.stride;
      for (std::size_t c = 0; c < columns; ++c) to[c] += from[k] * b0[c];
    }
  }
}

// out[c][d] += sum over r of a[r][c] * b[r][d].
OFFLOAD_WIDE
void add_transposed_product(float* out, std::ptrdiff_t out_stride, Tile a, Tile b, std::size_t rows,
                            std::size_t columns, std::size_t channels) {
  for (std::size_t c = 0; c < columns; ++c) {
    float* to = out + static_cast<std::ptrdiff_t>(c) * out_stride;
    for (std::size_t r = 0; r < rows; ++r) {
      const float factor =
          a.data[static_cast<std::ptrdiff_t>(r) * a.stride + static_cast<std::ptrdiff_t>(c)];
      const float* from = b.data + static_cast<std::ptrdiff_t>(r) * b.stride;
      for (std::size_t d = 0; d < channels; ++d) to[d] += factor * from[d];
    }
  }
}

void transpose(float* out, Tile in, std::size_t rows, std::size_t columns) {
  for (std::size_t r = 0; r < rows; ++r) {
    const float* from = in.data + static_cast<std::ptrdiff_t>(r) * in.stride;
    for (std::size_t c = 0; c < columns; ++c) out[c * rows + r] = from[c];
  }
}

// p[c] = e^(s[c] * scale - shift); returns their sum.
OFFLOAD_WIDE
float exponentials(float* p, const float* s, float scale, float shift, std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) p[c] = exponential(s[c] * scale - shift);
  float lanes[kLanes] = {};
  std::size_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += p[c + lane];
  }
  float sum = 0;
  for (; c < count; ++c) sum += p[c];
  for (const float lane : lanes) sum += lane;
  return sum;
}

// The largest of s, or `most`.
OFFLOAD_WIDE
float largest(const float* s, float most, std::size_t count) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, most);
  std::size_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = s[c + lane] > lanes[lane] ? s[c + lane] : lanes[lane];
    }
  }
  for (; c < count; ++c) most = std::max(most, s[c]);
  for (const float lane : lanes) most = std::max(most, lane);
  return most;
}

OFFLOAD_WIDE
void scale_row(float* row, float factor, std::size_t count) {
  for (std::size_t d = 0; d < count; ++d) row[d] *= factor;
}

// ds[c] = p[c] * (dp[c] - delta) * scale.
OFFLOAD_WIDE
void score_gradients(float* ds, const float* p, const float* dp, float delta, float scale,
                     std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) ds[c] = p[c] * (dp[c] - delta) * scale;
}

// sum[c] += max(s[c], 0).
OFFLOAD_WIDE
void add_positive(float* sum, const float* s, std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) sum[c] += std::max(s[c], 0.0f);
}

struct Span {
  std::size_t begin;
  std::size_t count;
};

Span span_of(const AttentionShape& shape, Blocks blocks, std::size_t batch, std::size_t at) {
  const auto number = static_cast<std::size_t>(blocks.numbers[batch * blocks.count + at]);
  const std::size_t begin = number * shape.block_tokens;
  return {begin, std::min(shape.block_tokens, shape.length - begin)};
}

bool sees(const AttentionShape& shape, std::size_t batch, std::size_t row, std::size_t column) {
  if (column > row) return false;
  if (shape.window != 0 && row - column >= shape.window) return false;
  if (shape.documents == nullptr) return true;
  const std::int32_t* documents = shape.documents + batch * shape.length;
  return documents[row] == documents[column];
}

// Whether rows see all of the columns by position alone.
bool sees_all(const AttentionShape& shape, Span rows, Span columns) {
  return shape.documents == nullptr && columns.begin + columns.count <= rows.begin + 1 &&
         (shape.window == 0 || rows.begin + rows.count - columns.begin <= shape.window);
}

// Whether they see none of them, by position alone.
bool sees_none(const AttentionShape& shape, Span rows, Span columns) {
  return columns.begin >= rows.begin + rows.count ||
         (shape.window != 0 && rows.begin + 1 >= columns.begin + columns.count + shape.window);
}

void mask(const AttentionShape& shape, std::size_t batch, Span rows, Span columns, float* scores) {
  for (std::size_t r = 0; r < rows.count; ++r) {
    for (std::size_t c = 0; c < columns.count; ++c) {
      if (!sees(shape, batch, rows.begin + r, columns.begin + c)) {
        scores[r * columns.count + c] = kNothing;
      }
    }
  }
}

Tile tile_of(Heads<const float> heads, std::size_t batch, std::size_t head, std::size_t at) {
  return {heads.row(batch, head, at), heads.row_stride};
}

// The scores of rows and columns before their scale; `turned` is the columns' keys, transposed.
void make_scores(const AttentionShape& shape, std::size_t batch, Tile query, const float* turned,
                 Span rows, Span columns, float* scores) {
  std::fill_n(scores, rows.count * columns.count, 0.0f);
  add_product(scores, static_cast<std::ptrdiff_t>(columns.count), query,
              {turned, static_cast<std::ptrdiff_t>(columns.count)}, rows.count, shape.channels,
              columns.count);
  if (!sees_all(shape, rows, columns)) mask(shape, batch, rows, columns, scores);
}

struct Row {
  float most = kNothing;
  float sum = 0;
};

// What one block of rows has seen so far, and takes in of a block of columns.
void take_in(const AttentionShape& shape, Span rows, Span columns, const float* scores, float* p,
             std::vector<Row>& state, float* out, std::ptrdiff_t out_stride) {
  for (std::size_t r = 0; r < rows.count; ++r) {
    const float* s = scores + r * columns.count;
    const float most = std::max(state[r].most, largest(s, kNothing, columns.count) * shape.scale);
    const float shift = most == kNothing ? 0.0f : most;
    const float factor = exponential(state[r].most - shift);
    const float sum = exponentials(p + r * columns.count, s, shape.scale, shift, columns.count);
    state[r].sum = state[r].sum * factor + sum;
    state[r].most = most;
    scale_row(out + static_cast<std::ptrdiff_t>(r) * out_stride, factor, shape.channels);
  }
}

}  // namespace

void block_attention(ThreadPool& pool, const AttentionShape& shape, Blocks rows, Blocks columns,
                     Heads<const float> query, Heads<const float> key, Heads<const float> value,
                     Heads<float> out, float* lse) {
  const std::size_t group = shape.heads / shape.key_heads;
  const std::size_t tile = shape.block_tokens * shape.block_tokens;
  pool.run(shape.batch * shape.heads * rows.count, [&](std::size_t task) {
    const std::size_t at = task % rows.count;
    const std::size_t head = task / rows.count % shape.heads;
    const std::size_t batch = task / rows.count / shape.heads;
    const Span own = span_of(shape, rows, batch, at);
    const std::size_t first = at * shape.block_tokens;
    float* to = out.row(batch, head, first);
    for (std::size_t r = 0; r < own.count; ++r) {
      std::fill_n(to + static_cast<std::ptrdiff_t>(r) * out.row_stride, shape.channels, 0.0f);
    }
    std::vector<float> turned(shape.block_tokens * shape.channels), scores(tile), p(tile);
    std::vector<Row> state(own.count);
    for (std::size_t n = 0; n < columns.count; ++n) {
      const Span other = span_of(shape, columns, batch, n);
      if (sees_none(shape, own, other)) continue;
      transpose(turned.data(), tile_of(key, batch, head / group, other.begin), other.count,
                shape.channels);
      make_scores(shape, batch, tile_of(query, batch, head, own.begin), turned.data(), own, other,
                  scores.data());
      take_in(shape, own, other, scores.data(), p.data(), state, to, out.row_stride);
      add_product(to, out.row_stride, {p.data(), static_cast<std::ptrdiff_t>(other.count)},
                  tile_of(value, batch, head / group, other.begin), own.count, other.count,
                  shape.channels);
    }
    float* sums = lse + (batch * shape.heads + head) * rows.count * shape.block_tokens + first;
    for (std::size_t r = 0; r < own.count; ++r) {
      const bool seen = state[r].sum > 0;
      sums[r] = seen ? state[r].most + std::log(state[r].sum) : kNothing;
      scale_row(to + static_cast<std::ptrdiff_t>(r) * out.row_stride,
                seen ? 1.0f / state[r].sum : 0.0f, shape.channels);
    }
  });
}

void block_attention_backward(ThreadPool& pool, const AttentionShape& shape, Blocks rows,
                              Blocks columns, Heads<const float> query, Heads<const float> key,
                              Heads<const float> value, Heads<const float> out, const float* lse,
                              Heads<const float> grad_out, Heads<float> grad_query,
                              Heads<float> grad_key, Heads<float> grad_value) {
  const std::size_t group = shape.heads / shape.key_heads;
  const std::size_t tile = shape.block_tokens * shape.block_tokens;
  const std::size_t turned_count = shape.block_tokens * shape.channels;
  // A task has all that adds to one head of keys, and so each sum has one order.
  pool.run(shape.batch * shape.key_heads, [&](std::size_t task) {
    const std::size_t batch = task / shape.key_heads;
    const std::size_t key_head = task % shape.key_heads;
    std::vector<float> turned_key(turned_count), turned_value(turned_count);
    std::vector<float> scores(tile), p(tile), dp(tile);
    std::vector<float> deltas(group * rows.count * shape.block_tokens);
    for (std::size_t index = 0; index < group * rows.count; ++index) {
      const std::size_t head = key_head * group + index / rows.count;
      const std::size_t first = index % rows.count * shape.block_tokens;
      const Span own = span_of(shape, rows, batch, index % rows.count);
      for (std::size_t r = 0; r < own.count; ++r) {
        const float* made = out.row(batch, head, first + r);
        const float* grad = grad_out.row(batch, head, first + r);
        float sum = 0;
        for (std::size_t d = 0; d < shape.channels; ++d) sum += made[d] * grad[d];
        deltas[index * shape.block_tokens + r] = sum;
        std::fill_n(grad_query.row(batch, head, first + r), shape.channels, 0.0f);
      }
    }
    for (std::size_t n = 0; n < columns.count; ++n) {
      const Span other = span_of(shape, columns, batch, n);
      const Tile keys = tile_of(key, batch, key_head, other.begin);
      transpose(turned_key.data(), keys, other.count, shape.channels);
      transpose(turned_value.data(), tile_of(value, batch, key_head, other.begin), other.count,
                shape.channels);
      const auto width = static_cast<std::ptrdiff_t>(other.count);
      float* to_key = grad_key.row(batch, key_head, n * shape.block_tokens);
      float* to_value = grad_value.row(batch, key_head, n * shape.block_tokens);
      for (std::size_t index = 0; index < group * rows.count; ++index) {
        const std::size_t head = key_head * group + index / rows.count;
        const std::size_t at = index % rows.count;
        const Span own = span_of(shape, rows, batch, at);
        if (sees_none(shape, own, other)) continue;
        const std::size_t first = at * shape.block_tokens;
        const Tile queries = tile_of(query, batch, head, own.begin);
        const Tile grads = tile_of(grad_out, batch, head, first);
        make_scores(shape, batch, queries, turned_key.data(), own, other, scores.data());
        std::fill_n(dp.data(), own.count * other.count, 0.0f);
        add_product(dp.data(), width, grads, {turned_value.data(), width}, own.count,
                    shape.channels, other.count);
        const float* sums =
            lse + (batch * shape.heads + head) * rows.count * shape.block_tokens + first;
        for (std::size_t r = 0; r < own.count; ++r) {
          const float shift = sums[r] == kNothing ? 0.0f : sums[r];
          const std::size_t begin = r * other.count;
          exponentials(p.data() + begin, scores.data() + begin, shape.scale, shift, other.count);
          score_gradients(scores.data() + begin, p.data() + begin, dp.data() + begin,
                          deltas[index * shape.block_tokens + r], shape.scale, other.count);
        }
        add_transposed_product(to_value, grad_value.row_stride, {p.data(), width}, grads, own.count,
                               other.count, shape.channels);
        add_transposed_product(to_key, grad_key.row_stride, {scores.data(), width}, queries,
                               own.count, other.count, shape.channels);
        add_product(grad_query.row(batch, head, first), grad_query.row_stride,
                    {scores.data(), width}, keys, own.count, other.count, shape.channels);
      }
    }
  });
}

void block_pair_scores(ThreadPool& pool, const AttentionShape& shape, bool ahead,
                       Heads<const float> query, Heads<const float> key, float* scores) {
  const std::size_t group = shape.heads / shape.key_heads;
  const std::size_t blocks = (shape.length + shape.block_tokens - 1) / shape.block_tokens;
  const std::size_t tile = shape.block_tokens * shape.block_tokens;
  const float share = shape.scale / static_cast<float>(shape.heads);
  const auto span = [&](std::size_t number) {
    const std::size_t begin = number * shape.block_tokens;
    return Span{begin, std::min(shape.block_tokens, shape.length - begin)};
  };
  pool.run(shape.batch * blocks, [&](std::size_t task) {
    const std::size_t batch = task / blocks;
    const std::size_t m = task % blocks;
    const Span own = span(m);
    std::vector<float> turned(shape.block_tokens * shape.channels), one(tile), sum(tile);
    float* to = scores + task * blocks;
    std::fill_n(to, blocks, -1.0f);
    for (std::size_t n = ahead ? m : 0; n < (ahead ? blocks : m + 1); ++n) {
      const Span other = span(n);
      std::fill_n(sum.data(), own.count * other.count, 0.0f);
      for (std::size_t head = 0; head < shape.heads; ++head) {
        transpose(turned.data(), tile_of(key, batch, head / group, other.begin), other.count,
                  shape.channels);
        std::fill_n(one.data(), own.count * other.count, 0.0f);
        add_product(one.data(), static_cast<std::ptrdiff_t>(other.count),
                    tile_of(query, batch, head, own.begin),
                    {turned.data(), static_cast<std::ptrdiff_t>(other.count)}, own.count,
                    shape.channels, other.count);
        add_positive(sum.data(), one.data(), own.count * other.count);
      }
      float most = -1.0f;
      for (std::size_t r = 0; r < own.count; ++r) {
        for (std::size_t c = 0; c < other.count; ++c) {
          const std::size_t row = own.begin + r, column = other.begin + c;
          const std::size_t early = std::min(row, column), late = std::max(row, column);
          const bool counts = row != column && (ahead || column < row);
          if (counts && sees(shape, batch, late, early)) {
            most = std::max(most, sum[r * other.count + c] * share);
          }
        }
      }
      to[n] = most;
    }
  });
}

}  // namespace offload
