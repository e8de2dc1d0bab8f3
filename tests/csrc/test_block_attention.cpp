// Attention over chosen blocks: against a plain sum over all pairs in double precision, its
// gradients against finite differences, and the same bits with any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "block_attention.h"
#include "check.h"

using namespace offload;

namespace {

constexpr std::size_t kBatch = 2, kHeads = 4, kKeyHeads = 2, kLength = 44, kChannels = 6;
constexpr std::size_t kBlockTokens = 8;  // the last block of a sequence has four
const std::vector<std::int32_t> kRows = {0, 2, 5, 1, 3, 4};
const std::vector<std::int32_t> kColumns = {0, 1, 2, 5, 0, 1, 3, 5};

using Values = std::vector<float>;

Values normal(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution;
  Values values(count);
  for (auto& value : values) value = distribution(random);
  return values;
}

template <typename T>
Heads<T> heads_of(T* data, std::size_t heads, std::size_t rows) {
  const auto row = static_cast<std::ptrdiff_t>(kChannels);
  const auto head = row * static_cast<std::ptrdiff_t>(rows);
  return {data, head * static_cast<std::ptrdiff_t>(heads), head, row};
}

struct Case {
  std::vector<std::int32_t> documents;
  AttentionShape shape;
  Values query, key, value, out, lse;

  Case(std::size_t window, bool packed)
      : query(normal(kBatch * kHeads * kLength * kChannels, 1)),
        key(normal(kBatch * kKeyHeads * kLength * kChannels, 2)),
        value(normal(kBatch * kKeyHeads * kLength * kChannels, 3)),
        out(kBatch * kHeads * rows() * kBlockTokens * kChannels, 0.0f),
        lse(kBatch * kHeads * rows() * kBlockTokens, 0.0f) {
    for (std::size_t at = 0; at < kBatch * kLength; ++at) {
      documents.push_back(static_cast<std::int32_t>(at % kLength / 15));
    }
    shape = {kBatch,    kHeads,       kKeyHeads, kLength,
             kChannels, kBlockTokens, 0.4f,      packed ? documents.data() : nullptr,
             window};
  }

  static std::size_t rows() { return kRows.size() / kBatch; }
  static std::size_t columns() { return kColumns.size() / kBatch; }
  static Blocks row_blocks() { return {kRows.data(), rows()}; }
  static Blocks column_blocks() { return {kColumns.data(), columns()}; }

  Heads<const float> queries() const { return heads_of(query.data(), kHeads, kLength); }
  Heads<const float> keys() const { return heads_of(key.data(), kKeyHeads, kLength); }
  Heads<const float> values() const { return heads_of(value.data(), kKeyHeads, kLength); }

  void forward(unsigned threads) {
    ThreadPool pool(threads);
    block_attention(pool, shape, row_blocks(), column_blocks(), queries(), keys(), values(),
                    heads_of(out.data(), kHeads, rows() * kBlockTokens), lse.data());
  }

  bool sees(std::size_t batch, std::size_t row, std::size_t column) const {
    const bool near = shape.window == 0 || row - column < shape.window;
    const auto* of = documents.data() + batch * kLength;
    return column <= row && near && (shape.documents == nullptr || of[row] == of[column]);
  }

  // Calls with (where the row lies in `out`, its position), and each position it may see.
  template <typename Visit>
  void for_each_row(const Visit& visit) const {
    for (std::size_t batch = 0; batch < kBatch; ++batch) {
      for (std::size_t head = 0; head < kHeads; ++head) {
        for (std::size_t m = 0; m < rows(); ++m) {
          for (std::size_t r = 0; r < kBlockTokens; ++r) {
            const std::size_t row =
                static_cast<std::size_t>(kRows[batch * rows() + m]) * kBlockTokens + r;
            if (row >= kLength) continue;
            std::vector<std::size_t> seen;
            for (std::size_t n = 0; n < columns(); ++n) {
              const auto first =
                  static_cast<std::size_t>(kColumns[batch * columns() + n]) * kBlockTokens;
              for (std::size_t c = first; c < std::min(first + kBlockTokens, kLength); ++c) {
                if (sees(batch, row, c)) seen.push_back(c);
              }
            }
            visit(batch, head, m * kBlockTokens + r, row, seen);
          }
        }
      }
    }
  }

  // The attention's output, weighed by `weights` as laid out in `out`, summed: in double.
  double weighed(const Values& weights, bool compare) const {
    double total = 0;
    for_each_row([&](std::size_t batch, std::size_t head, std::size_t at, std::size_t row,
                     const std::vector<std::size_t>& seen) {
      const float* q = queries().row(batch, head, row);
      std::vector<double> scores;
      double sum = 0;
      for (const std::size_t column : seen) {
        const float* k = keys().row(batch, head / 2, column);
        double score = 0;
        for (std::size_t c = 0; c < kChannels; ++c) score += static_cast<double>(q[c]) * k[c];
        scores.push_back(std::exp(score * static_cast<double>(shape.scale)));
        sum += scores.back();
      }
      const std::size_t place = (batch * kHeads + head) * rows() * kBlockTokens + at;
      for (std::size_t c = 0; c < kChannels; ++c) {
        double one = 0;
        for (std::size_t n = 0; n < seen.size(); ++n) {
          one += scores[n] / sum * static_cast<double>(values().row(batch, head / 2, seen[n])[c]);
        }
        total += one * static_cast<double>(weights[place * kChannels + c]);
        if (compare) CHECK(std::fabs(one - static_cast<double>(out[place * kChannels + c])) < 2e-6);
      }
      if (compare && sum > 0) {
        CHECK(std::fabs(std::log(sum) - static_cast<double>(lse[place])) < 2e-6);
      }
    });
    return total;
  }
};

bool same(const Values& a, const Values& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Gradients {
  Values query, key, value;

  Gradients(const Case& it, const Values& grad_out, unsigned threads)
      : query(it.out.size()),
        key(kBatch * kKeyHeads * Case::columns() * kBlockTokens * kChannels),
        value(key.size()) {
    ThreadPool pool(threads);
    const std::size_t rows = Case::rows() * kBlockTokens, columns = Case::columns() * kBlockTokens;
    block_attention_backward(
        pool, it.shape, Case::row_blocks(), Case::column_blocks(), it.queries(), it.keys(),
        it.values(), heads_of(it.out.data(), kHeads, rows), it.lse.data(),
        heads_of(grad_out.data(), kHeads, rows), heads_of(query.data(), kHeads, rows),
        heads_of(key.data(), kKeyHeads, columns), heads_of(value.data(), kKeyHeads, columns));
  }
};

// The slope of the weighed output with respect to *at, by central difference in double.
double slope(const Case& it, const Values& weights, float* at) {
  const float kept = *at, step = 1.0f / 256;
  *at = kept + step;
  const double above = it.weighed(weights, false), high = static_cast<double>(*at);
  *at = kept - step;
  const double below = it.weighed(weights, false), low = static_cast<double>(*at);
  *at = kept;
  return (above - below) / (high - low);
}

void gives_what_a_plain_sum_gives(std::size_t window, bool packed) {
  Case it(window, packed);
  it.forward(2);
  it.weighed(Values(it.out.size(), 1.0f), true);
}

void gradients_are_the_slopes(std::size_t window, bool packed) {
  Case it(window, packed);
  it.forward(2);
  const Values weights = normal(it.out.size(), 4);
  const Gradients found(it, weights, 2);
  std::mt19937 random(5);
  for (int trial = 0; trial < 60; ++trial) {
    const std::size_t batch = random() % kBatch, head = random() % kHeads;
    const std::size_t inside = random() % (kBlockTokens / 2) * kChannels + random() % kChannels;
    const std::size_t m = random() % Case::rows(), n = random() % Case::columns();
    const auto row = static_cast<std::size_t>(kRows[batch * Case::rows() + m]) * kBlockTokens;
    const auto column =
        static_cast<std::size_t>(kColumns[batch * Case::columns() + n]) * kBlockTokens;
    const auto close = [&](float gradient, double expected) {
      CHECK(std::fabs(static_cast<double>(gradient) - expected) < 2e-4 * (1 + std::fabs(expected)));
    };
    float* query = it.query.data() + ((batch * kHeads + head) * kLength + row) * kChannels + inside;
    const std::size_t of_row =
        ((batch * kHeads + head) * Case::rows() + m) * kBlockTokens * kChannels + inside;
    close(found.query[of_row], slope(it, weights, query));
    const std::size_t pair = batch * kKeyHeads + head / 2;
    const std::size_t from = (pair * kLength + column) * kChannels + inside;
    const std::size_t of_column = (pair * Case::columns() + n) * kBlockTokens * kChannels + inside;
    close(found.key[of_column], slope(it, weights, it.key.data() + from));
    close(found.value[of_column], slope(it, weights, it.value.data() + from));
  }
}

void threads_do_not_change_a_bit() {
  Case one(0, false), four(0, false);
  one.forward(1);
  four.forward(4);
  CHECK(same(one.out, four.out) && same(one.lse, four.lse));
  const Values weights = normal(one.out.size(), 4);
  const Gradients of_one(one, weights, 1), of_four(four, weights, 4);
  CHECK(same(of_one.query, of_four.query));
  CHECK(same(of_one.key, of_four.key) && same(of_one.value, of_four.value));
}

// LeMo's Eq. 2 in double, over the pairs that count.
void pair_scores_are_the_largest_mean_of_positive_parts(bool ahead) {
  Case it(0, true);
  const std::size_t blocks = (kLength + kBlockTokens - 1) / kBlockTokens;
  Values scores(kBatch * blocks * blocks);
  ThreadPool pool(2);
  block_pair_scores(pool, it.shape, ahead, it.queries(), it.keys(), scores.data());
  std::vector<double> most(scores.size(), -1);
  for (std::size_t batch = 0; batch < kBatch; ++batch) {
    for (std::size_t row = 0; row < kLength; ++row) {
      for (std::size_t column = 0; column < kLength; ++column) {
        const bool later = row != column && row / kBlockTokens <= column / kBlockTokens;
        const bool counts = ahead ? later : column < row;
        if (!counts || !it.sees(batch, std::max(row, column), std::min(row, column))) continue;
        double mean = 0;
        for (std::size_t head = 0; head < kHeads; ++head) {
          double score = 0;
          for (std::size_t c = 0; c < kChannels; ++c) {
            score += static_cast<double>(it.queries().row(batch, head, row)[c]) *
                     static_cast<double>(it.keys().row(batch, head / 2, column)[c]);
          }
          mean += std::max(score * static_cast<double>(it.shape.scale), 0.0) / kHeads;
        }
        auto& best = most[(batch * blocks + row / kBlockTokens) * blocks + column / kBlockTokens];
        best = std::max(best, mean);
      }
    }
  }
  for (std::size_t pair = 0; pair < most.size(); ++pair) {
    CHECK(std::fabs(most[pair] - static_cast<double>(scores[pair])) < 2e-6);
  }
}

}  // namespace

int main() {
  for (const std::size_t window : {0u, 11u}) {
    for (const bool packed : {false, true}) {
      gives_what_a_plain_sum_gives(window, packed);
      gradients_are_the_slopes(window, packed);
    }
  }
  threads_do_not_change_a_bit();
  for (const bool ahead : {false, true}) pair_scores_are_the_largest_mean_of_positive_parts(ahead);
  return check::status();
}
