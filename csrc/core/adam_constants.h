// What all elements of one step of AdamW share.
#pragma once

namespace offload {

// Made by make_adam_constants().
struct AdamConstants {
  float grad_factor;    // the inverse of the loss scale, times what clipping leaves; minus that
                        // to maximize
  float decay;          // 1 - lr * weight_decay
  float lerp_weight;    // of the gradient in exp_avg: 1 - beta1, or -beta1 where that is closer
  bool lerp_from_grad;  // the latter
  float beta2;
  float one_minus_beta2;
  float step_size;        // lr / (1 - beta1^step)
  float root_correction;  // sqrt(1 - beta2^step)
  float eps;
};

}  // namespace offload
