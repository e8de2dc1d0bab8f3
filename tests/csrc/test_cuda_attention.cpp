// The CUDA kernels of attention over blocks, run by an emulated grid: against the host's kernel
// over random shapes, and the same bits in whatever order threads and thread blocks run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "block_attention.h"
#include "check.h"
#include "emulated_grid.h"

using namespace offload;

namespace {

using Values = std::vector<float>;
using Bytes = std::vector<unsigned char>;

// Rows and columns of one head, [batch, heads, tokens, channels], as the kernels take and give it.
struct Stored {
  Bytes bytes;
  std::size_t heads, tokens, channels;
  DType dtype;

  Stored(std::size_t batch, std::size_t heads, std::size_t tokens, std::size_t channels,
         DType dtype)
      : bytes(batch * heads * tokens * channels * dtype_bytes(dtype), 0xFF),
        heads(heads),
        tokens(tokens),
        channels(channels),
        dtype(dtype) {}

  std::size_t count() const { return bytes.size() / dtype_bytes(dtype); }

  void draw(std::mt19937& random) {
    std::normal_distribution<float> distribution;
    for (std::size_t at = 0; at < count(); ++at)
      store(bytes.data(), at, distribution(random), dtype);
  }

  // Heads inside of tokens, as projections leave them: strides are not those of a plain tensor.
  HeadRows rows() {
    return {bytes.data(), static_cast<std::int64_t>(tokens * heads * channels),
            static_cast<std::int64_t>(channels), static_cast<std::int64_t>(heads * channels)};
  }

  Values floats() const {
    Values found(count());
    for (std::size_t at = 0; at < found.size(); ++at) found[at] = load(bytes.data(), at, dtype);
    return found;
  }
};

// The same for the host's kernel.
template <typename T, typename Data>
Heads<T> heads_of(Data& values, const Stored& like) {
  const auto row = static_cast<std::ptrdiff_t>(like.heads * like.channels);
  return {values.data(), row * static_cast<std::ptrdiff_t>(like.tokens),
          static_cast<std::ptrdiff_t>(like.channels), row};
}

struct Draw {
  std::size_t batch, key_heads, group, length, channels, block_tokens, window;
  bool packed;
  DType dtype;
};

struct Case {
  Draw drawn;
  std::vector<std::int32_t> documents, rows, columns;
  AttentionShape shape;
  Stored query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  Values lse, delta;

  Case(const Draw& draw, std::mt19937& random)
      : drawn(draw),
        documents(make_documents(random)),
        rows(listed(random)),
        columns(listed(random)),
        shape{draw.batch,
              draw.key_heads * draw.group,
              draw.key_heads,
              draw.length,
              draw.channels,
              draw.block_tokens,
              1.0f / std::sqrt(static_cast<float>(draw.channels)),
              draw.packed ? documents.data() : nullptr,
              draw.window},
        query(whole(shape.heads)),
        key(whole(shape.key_heads)),
        value(key),
        out(draw.batch, shape.heads, padded(), draw.channels, draw.dtype),
        grad_out(out),
        grad_query(query),
        grad_key(key),
        grad_value(key),
        lse(draw.batch * shape.heads * padded(), NAN),
        delta(lse) {
    for (Stored* each : {&query, &key, &value, &grad_out}) each->draw(random);
  }

  Stored whole(std::size_t heads) const {
    return {drawn.batch, heads, drawn.length, drawn.channels, drawn.dtype};
  }

  std::size_t blocks() const {
    return (drawn.length + drawn.block_tokens - 1) / drawn.block_tokens;
  }
  std::size_t padded() const { return rows.size() / drawn.batch * drawn.block_tokens; }

  std::vector<std::int32_t> make_documents(std::mt19937& random) const {
    std::vector<std::int32_t> found;
    for (std::size_t at = 0; at < drawn.batch * drawn.length; ++at) {
      const bool same = at % drawn.length != 0 && random() % 16 != 0;
      found.push_back(same ? found.back() : static_cast<std::int32_t>(random() % 5));
    }
    return found;
  }

  // Ascending numbers of blocks, as many for each of a batch.
  std::vector<std::int32_t> listed(std::mt19937& random) const {
    std::vector<std::int32_t> all(blocks()), found;
    std::iota(all.begin(), all.end(), 0);
    const std::size_t count = 1 + random() % blocks();
    for (std::size_t batch = 0; batch < drawn.batch; ++batch) {
      std::shuffle(all.begin(), all.end(), random);
      std::sort(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
      found.insert(found.end(), all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return found;
  }

  BlockAttentionArrays arrays() {
    BlockAttentionArrays given;
    given.shape = shape;
    given.rows = {rows.data(), rows.size() / drawn.batch};
    given.columns = {columns.data(), columns.size() / drawn.batch};
    given.dtype = drawn.dtype;
    given.query = query.rows();
    given.key = key.rows();
    given.value = value.rows();
    given.out = out.rows();
    given.lse = lse.data();
    given.grad_out = grad_out.rows();
    given.delta = delta.data();
    given.grad_query = grad_query.rows();
    given.grad_key = grad_key.rows();
    given.grad_value = grad_value.rows();
    return given;
  }
};

// Rounding to the type that is stored, of half a unit in the last place.
double rounding(DType dtype) {
  if (dtype == DType::kFloat32) return 0;
  return dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
}

// `sums`: what sums in fp32, in another order, may differ by: see kSums.
void close(float found, float expected, double sums, DType dtype) {
  const double of = std::fabs(static_cast<double>(expected));
  const double off = std::fabs(static_cast<double>(found) - static_cast<double>(expected));
  if (off <= (sums + rounding(dtype)) * of + sums) {
    CHECK(true);
  } else {
    CHECK_EQ(found, expected);
  }
}

// Scores of normal numbers are sums of up to 256 terms of about 1/16 each: off by a few roundings
// of 2^-24 times their magnitude, up to 10. Weights are off by as much, relatively; outputs are
// means of values by those, and gradients sums over up to 300 tokens of them.
constexpr double kSums = 2e-5, kGradientSums = 2e-4;

// A gradient's place in the host kernel's, which has blocks side by side: or nowhere.
std::vector<std::ptrdiff_t> places(const Case& it, const std::vector<std::int32_t>& listed,
                                   std::size_t batch) {
  std::vector<std::ptrdiff_t> found(it.drawn.length, -1);
  const std::size_t count = listed.size() / it.drawn.batch;
  for (std::size_t index = 0; index < count * it.drawn.block_tokens; ++index) {
    const auto number =
        static_cast<std::size_t>(listed[batch * count + index / it.drawn.block_tokens]);
    const std::size_t at = number * it.drawn.block_tokens + index % it.drawn.block_tokens;
    if (at < it.drawn.length) found[at] = static_cast<std::ptrdiff_t>(index);
  }
  return found;
}

void check_gradient(const Case& it, const Stored& found, const Values& expected,
                    const std::vector<std::int32_t>& listed, std::size_t padded) {
  const Values floats = found.floats();
  for (std::size_t batch = 0; batch < it.drawn.batch; ++batch) {
    const auto at = places(it, listed, batch);
    for (std::size_t token = 0; token < it.drawn.length; ++token) {
      for (std::size_t inside = 0; inside < found.heads * found.channels; ++inside) {
        const float own =
            floats[(batch * it.drawn.length + token) * found.heads * found.channels + inside];
        if (at[token] < 0) {  // nothing was written: it is as it was
          CHECK(std::isnan(own));
          continue;
        }
        const std::size_t there = batch * padded + static_cast<std::size_t>(at[token]);
        close(own, expected[there * found.heads * found.channels + inside], kGradientSums,
              it.drawn.dtype);
      }
    }
  }
}

void check_backward(Case& it, ThreadPool& pool, const Blocks& rows, const Blocks& columns) {
  const std::size_t width = columns.count * it.drawn.block_tokens;
  const Values query = it.query.floats(), key = it.key.floats(), value = it.value.floats();
  const Values out = it.out.floats(), grad_out = it.grad_out.floats();
  const Stored side_by_side(it.drawn.batch, it.shape.key_heads, width, it.drawn.channels,
                            DType::kFloat32);
  Values to_query(out.size()), to_key(side_by_side.count()), to_value(to_key.size());
  block_attention_backward(
      pool, it.shape, rows, columns, heads_of<const float>(query, it.query),
      heads_of<const float>(key, it.key), heads_of<const float>(value, it.value),
      heads_of<const float>(out, it.out), it.lse.data(), heads_of<const float>(grad_out, it.out),
      heads_of<float>(to_query, it.out), heads_of<float>(to_key, side_by_side),
      heads_of<float>(to_value, side_by_side));
  CHECK_EQ(emulated::block_attention_backward(it.arrays(), 3), 0);
  check_gradient(it, it.grad_query, to_query, it.rows, it.padded());
  check_gradient(it, it.grad_key, to_key, it.columns, width);
  check_gradient(it, it.grad_value, to_value, it.columns, width);
}

void kernels_give_what_the_hosts_give(const Draw& draw, std::mt19937& random) {
  Case it(draw, random);
  ThreadPool pool(2);
  const Blocks rows = it.arrays().rows, columns = it.arrays().columns;
  const Values query = it.query.floats(), key = it.key.floats(), value = it.value.floats();
  Values out(it.out.count(), 0.0f), lse(it.lse.size(), -INFINITY);
  block_attention(pool, it.shape, rows, columns, heads_of<const float>(query, it.query),
                  heads_of<const float>(key, it.key), heads_of<const float>(value, it.value),
                  heads_of<float>(out, it.out), lse.data());
  CHECK_EQ(emulated::block_attention(it.arrays(), 2), 0);
  const Values found = it.out.floats();
  for (std::size_t at = 0; at < out.size(); ++at) close(found[at], out[at], kSums, draw.dtype);
  for (std::size_t at = 0; at < lse.size(); ++at) {
    if (std::isinf(lse[at])) {
      CHECK_EQ(it.lse[at], lse[at]);
    } else {
      close(it.lse[at], lse[at], kSums, DType::kFloat32);
    }
  }
  check_backward(it, pool, rows, columns);
}

void orders_change_no_bit() {
  std::mt19937 random(11);
  Case it({1, 1, 2, 150, 72, 16, 40, true, DType::kFloat32}, random);
  Case other = it;
  other.shape.documents = other.documents.data();
  CHECK_EQ(emulated::block_attention(it.arrays(), 1), 0);
  CHECK_EQ(emulated::block_attention(other.arrays(), 2), 0);
  CHECK(it.out.bytes == other.out.bytes);
  CHECK(std::memcmp(it.lse.data(), other.lse.data(), it.lse.size() * sizeof(float)) == 0);
  CHECK_EQ(emulated::block_attention_backward(it.arrays(), 1), 0);
  CHECK_EQ(emulated::block_attention_backward(other.arrays(), 2), 0);
  CHECK(it.grad_query.bytes == other.grad_query.bytes);
  CHECK(it.grad_key.bytes == other.grad_key.bytes);
  CHECK(it.grad_value.bytes == other.grad_value.bytes);
}

void numbers_that_are_none_are_not_hidden() {
  std::mt19937 random(12);
  Case it({1, 1, 1, 8, 4, 8, 0, false, DType::kFloat32}, random);
  store(it.query.bytes.data(), 3 * 4, NAN, DType::kFloat32);
  CHECK_EQ(emulated::block_attention(it.arrays(), 1), 0);
  const Values found = it.out.floats();
  for (std::size_t at = 0; at < found.size(); ++at) CHECK_EQ(std::isnan(found[at]), at / 4 == 3);
}

void pair_scores_are_the_hosts(const Draw& draw, bool ahead, std::mt19937& random) {
  Case it(draw, random);
  const std::size_t blocks = it.blocks();
  Values expected(draw.batch * blocks * blocks), found(expected.size(), NAN), again(found);
  ThreadPool pool(2);
  const Values query = it.query.floats(), key = it.key.floats();
  block_pair_scores(pool, it.shape, ahead, heads_of<const float>(query, it.query),
                    heads_of<const float>(key, it.key), expected.data());
  BlockAttentionArrays given = it.arrays();
  given.scores = found.data();
  CHECK_EQ(emulated::block_pair_scores(given, ahead, 1), 0);
  for (std::size_t at = 0; at < found.size(); ++at) {
    if (expected[at] < 0) {
      CHECK_EQ(found[at], expected[at]);
    } else {
      CHECK(found[at] >= 0);
      close(found[at], expected[at], kSums, DType::kFloat32);
    }
  }
  given.scores = again.data();
  CHECK_EQ(emulated::block_pair_scores(given, ahead, 2), 0);
  CHECK(std::memcmp(found.data(), again.data(), found.size() * sizeof(float)) == 0);
}

void what_does_not_fit_is_refused() {
  std::mt19937 random(13);
  Case it({1, 1, 1, 8, 4, 8, 0, false, DType::kFloat32}, random);
  const auto refused = [&](const auto& change) {
    BlockAttentionArrays given = it.arrays();
    change(given);
    CHECK_EQ(emulated::block_attention(given, 1), emulated::kRefused);
    CHECK_EQ(emulated::block_attention_backward(given, 1), emulated::kRefused);
  };
  refused([](auto& given) { given.shape.channels = kMostChannels + 1; });
  refused([](auto& given) { given.shape.channels = 0; });
  refused([](auto& given) { given.shape.key_heads = 2; });
  refused([](auto& given) { given.shape.block_tokens = 0; });
  refused([](auto& given) { given.shape.length = std::size_t{1} << 31; });
  refused([](auto& given) { given.shape.heads = kMostInGrid + 1; });
  refused([](auto& given) { given.rows.count = 0; });
  refused([](auto& given) { given.columns.count = 3; });
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const std::size_t channels[] = {1, 5, 64, 72, 130, 256}, tokens[] = {1, 4, 16, 24, 64, 128, 160};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (unsigned number = 0; number < 21; ++number) {
    const std::size_t block = tokens[number % 7];
    const std::size_t windows[] = {0, 1, block, 2 * block + 1};
    const Draw draw = {1 + random() % 2,      1 + random() % 2,     1 + random() % 3,
                       1 + random() % 200,    channels[number % 6], block,
                       windows[random() % 4], random() % 2 == 0,    dtypes[number % 3]};
    kernels_give_what_the_hosts_give(draw, random);
    pair_scores_are_the_hosts(draw, number % 2 == 0, random);
  }
  orders_change_no_bit();
  numbers_that_are_none_are_not_hidden();
  what_does_not_fit_is_refused();
  return check::status();
}
