// What the update is held against: the same bytes read and written, nothing computed.
#include <cstddef>
#include <cstdint>

// `zero` is 0, which the compiler does not know.
extern "C" void pass_over(std::uint32_t zero, const std::uint16_t* __restrict grad,
                          std::uint32_t* __restrict master_param, std::uint32_t* __restrict exp_avg,
                          std::uint32_t* __restrict exp_avg_sq, std::uint16_t* __restrict param,
                          std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    master_param[i] ^= zero;
    exp_avg[i] ^= zero;
    exp_avg_sq[i] ^= zero;
    param[i] = static_cast<std::uint16_t>(grad[i] ^ zero);
  }
}
