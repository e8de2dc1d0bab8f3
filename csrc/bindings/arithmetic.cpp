#include "arithmetic.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "../core/adam.h"
#include "../core/thread_pool.h"

namespace py = pybind11;

namespace offload {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not '" + name + "'");
}

const AdamVersion& version_named(const std::optional<std::string>& name) {
  if (!name) return best_adam_version();
  if (const AdamVersion* version = adam_version(name->c_str())) return *version;
  throw std::invalid_argument("version='" + *name + "' is none of this processor's");
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void update(ThreadPool& pool, const AdamSettings& settings, std::uint64_t step, double grad_scale,
            double clip, std::uintptr_t grad, const std::string& grad_dtype,
            std::uintptr_t master_param, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
            std::uintptr_t param, const std::string& param_dtype, std::size_t count,
            const std::optional<std::string>& version) {
  if (step == 0) throw std::invalid_argument("step counts from 1, and is 0");
  AdamArrays arrays;
  arrays.grad = pointer<void>(grad);
  arrays.grad_dtype = dtype_named(grad_dtype);
  arrays.master_param = pointer<float>(master_param);
  arrays.exp_avg = pointer<float>(exp_avg);
  arrays.exp_avg_sq = pointer<float>(exp_avg_sq);
  arrays.param = pointer<void>(param);
  arrays.param_dtype = dtype_named(param_dtype);
  arrays.count = count;
  adam_update(pool, make_adam_constants(settings, step, grad_scale, clip), arrays,
              version_named(version));
}

}  // namespace

void bind_arithmetic(py::module_& module) {
  py::class_<ThreadPool>(module, "ThreadPool")
      .def(py::init<unsigned, const std::vector<int>&>(), py::arg("num_threads"),
           py::arg("cpus") = std::vector<int>{})
      .def_property_readonly("num_threads", &ThreadPool::num_threads);
  py::class_<AdamSettings>(module, "AdamSettings")
      .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay,
                       bool maximize) {
             return AdamSettings{lr, beta1, beta2, eps, weight_decay, maximize};
           }),
           py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("maximize") = false);
  module.def("adam_path", &adam_path);
  module.def("adam_update", &update, py::arg("pool"), py::arg("settings"), py::arg("step"),
             py::kw_only(), py::arg("grad_scale"), py::arg("clip"), py::arg("grad"),
             py::arg("grad_dtype"), py::arg("master_param"), py::arg("exp_avg"),
             py::arg("exp_avg_sq"), py::arg("param"), py::arg("param_dtype"), py::arg("count"),
             py::arg("version") = py::none(), NoGil());
  module.attr("NORM_BLOCK") = kNormBlock;
  module.def(
      "adam_constants",
      [](const AdamSettings& settings, std::uint64_t step, double grad_scale, double clip) {
        if (step == 0) throw std::invalid_argument("step counts from 1, and is 0");
        // All of it, so that no byte between the members is another one each time.
        alignas(AdamConstants) char bytes[sizeof(AdamConstants)] = {};
        *reinterpret_cast<AdamConstants*>(bytes) =
            make_adam_constants(settings, step, grad_scale, clip);
        return py::bytes(bytes, sizeof bytes);
      },
      py::arg("settings"), py::arg("step"), py::kw_only(), py::arg("grad_scale"), py::arg("clip"));
  module.def("sum_of_blocks", [](std::vector<double> sums) { return sum_of_blocks(sums); });
  for (const auto& [name, sum] :
       {std::pair{"squared_norm", &squared_norm}, std::pair{"plain_sum", &plain_sum}}) {
    module.def(
        name,
        [sum = sum](ThreadPool& pool, std::uintptr_t values, const std::string& dtype,
                    std::size_t count, const std::optional<std::string>& version) {
          return sum(pool, pointer<void>(values), dtype_named(dtype), count,
                     version_named(version));
        },
        py::arg("pool"), py::arg("values"), py::arg("dtype"), py::arg("count"),
        py::arg("version") = py::none(), NoGil());
  }
}

}  // namespace offload
