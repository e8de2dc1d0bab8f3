// offload._C: the native core as Python sees it. Addresses cross as integers; every call that may
// wait or copy releases the GIL; errors arrive as OSError with errno, message and path.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "../core/align.h"
#include "../core/arena.h"
#include "../core/crc32c.h"
#include "../core/error.h"
#include "../core/file.h"
#include "../core/fork_guard.h"
#include "../core/spill.h"
#include "arithmetic.h"
#include "attention.h"
#include "extent_type.h"
#include "signal_safe.h"
#include "view_type.h"

namespace py = pybind11;
using namespace offload;  // NOLINT: one file, one purpose

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

FaultRule make_rule(const std::string& op, std::uint64_t first, std::uint64_t count,
                    const std::string& action, int code, std::uint64_t nbytes, double delay_s) {
  FaultRule rule;
  if (op == "read") {
    rule.op = IoOp::kRead;
  } else if (op == "write") {
    rule.op = IoOp::kWrite;
  } else if (op != "any") {
    throw std::invalid_argument("op must be read, write or any, not '" + op + "'");
  }
  using Action = FaultRule::Action;
  if (action == "error") {
    rule.action = Action::kError;
  } else if (action == "short") {
    rule.action = Action::kShort;
  } else if (action == "delay") {
    rule.action = Action::kDelay;
  } else if (action == "corrupt") {
    rule.action = Action::kCorrupt;
  } else {
    throw std::invalid_argument("action must be error, short, delay or corrupt, not '" + action +
                                "'");
  }
  rule.first = first;
  rule.count = count;
  rule.code = code;
  rule.nbytes = nbytes;
  rule.delay_s = delay_s;
  return rule;
}

std::shared_ptr<Spill> open_spill(const std::string& directory, std::shared_ptr<Arena> arena,
                                  const std::string& engine, unsigned queue_depth,
                                  std::uint64_t block_bytes, std::uint64_t spill_bytes, bool verify,
                                  bool direct, bool register_buffers,
                                  const std::optional<FaultPlan>& fault_plan) {
  SpillOptions options;
  options.directory = directory;
  options.engine = engine;
  options.queue_depth = queue_depth;
  options.block_bytes = block_bytes;
  options.spill_bytes = spill_bytes;
  options.verify = verify;
  options.direct = direct;
  options.register_buffers = register_buffers;
  options.faults = fault_plan;
  options.poll = [] {
    py::gil_scoped_acquire gil;  // Ctrl-C must end a wait for a drive that hangs
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  return Spill::open(std::move(options), std::move(arena));
}

py::dict probe_engines() {
  py::dict engines;
  try {
    make_uring_engine(1);
    engines["uring"] = py::make_tuple(true, "io_uring works here");
  } catch (const IoError& error) {
    engines["uring"] = py::make_tuple(false, error.what());
  }
  engines["posix"] = py::make_tuple(true, "pread and pwrite on threads work everywhere");
  return engines;
}

py::dict spill_stats(const Spill& spill) {
  const SpillStats stats = spill.stats();
  py::dict out;
  out["write_bytes"] = stats.queue.write_bytes;
  out["read_bytes"] = stats.queue.read_bytes;
  out["requests"] = stats.queue.requests;
  out["resumed"] = stats.queue.resumed;
  out["verify_s"] = stats.queue.verify_s;
  out["thread_cpu_s"] = stats.queue.thread_cpu_s;
  out["read_busy_s"] = stats.queue.busy.read_s;
  out["write_busy_s"] = stats.queue.busy.write_s;
  out["mixed_busy_s"] = stats.queue.busy.mixed_s;
  out["mixed_bytes"] = stats.queue.busy.mixed_bytes;
  out["used_bytes"] = stats.used_bytes;
  out["peak_used_bytes"] = stats.peak_used_bytes;
  out["reserved_bytes"] = stats.reserved_bytes;
  out["limit_bytes"] = stats.limit_bytes;
  out["reloaded_bytes"] = stats.reloaded_bytes;
  out["forwarded_bytes"] = stats.forwarded_bytes;
  out["cancelled_bytes"] = stats.cancelled_bytes;
  out["kept_bytes"] = stats.kept_bytes;
  out["kept_total_bytes"] = stats.kept_total_bytes;
  out["copy_s"] = stats.copy_s;
  out["write_wait_s"] = stats.write_wait_s;
  out["read_wait_s"] = stats.read_wait_s;
  return out;
}

py::dict arena_stats(const Arena& arena) {
  const ArenaStats stats = arena.stats();
  py::dict out;
  out["capacity_bytes"] = stats.capacity;
  out["used_bytes"] = stats.used;
  out["peak_used_bytes"] = stats.peak_used;
  out["outside_bytes"] = stats.outside;
  out["native_bytes"] = stats.native;
  out["native_peak_bytes"] = stats.native_peak;
  return out;
}

// What a function of the C API made, or its error.
py::object made(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object allocate_buffer(Arena& arena, std::uint64_t nbytes, std::uint64_t lead) {
  if (nbytes == 0 || lead >= kTensorAlign) {
    throw std::invalid_argument("a buffer has at least a byte, and its lead is below 64");
  }
  auto slice = arena.try_allocate(lead + nbytes);
  if (slice == nullptr) return py::none();
  std::byte* first = slice->data() + lead;
  return made(make_buffer({std::move(slice), first, nbytes, false}));
}

void bind_memory(py::module_& module) {
  py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
      .def(py::init([](std::size_t nbytes) { return Arena::create(nbytes); }), py::arg("nbytes"))
      .def("allocate", &allocate_buffer, py::arg("nbytes"), py::arg("lead"))
      .def("set_limit", &Arena::set_limit, py::arg("nbytes"))
      .def("mark_resident", &Arena::mark_resident)
      .def("trim", &Arena::trim)
      .def_property_readonly(
          "address",
          [](const Arena& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def_property_readonly("nbytes", &Arena::capacity)
      .def_property_readonly("free_bytes",
                             [](const Arena& self) {
                               const ArenaStats stats = self.stats();
                               return stats.capacity - stats.used;
                             })
      .def_property_readonly("numa_node", &Arena::numa_node)
      .def("stats", &arena_stats);
}

void bind_faults(py::module_& module) {
  py::class_<FaultRule>(module, "FaultRule")
      .def(py::init(&make_rule), py::kw_only(), py::arg("op") = "any", py::arg("first") = 0,
           py::arg("count") = 1, py::arg("action") = "error", py::arg("errno") = 5,
           py::arg("nbytes") = 0, py::arg("delay_s") = 0.0);
  py::class_<FaultPlan>(module, "FaultPlan")
      .def(py::init([](std::vector<FaultRule> rules, double bytes_per_s, bool discard) {
             return FaultPlan{std::move(rules), bytes_per_s, discard};
           }),
           py::kw_only(), py::arg("rules") = std::vector<FaultRule>{}, py::arg("bytes_per_s") = 0.0,
           py::arg("discard") = false);
}

void bind_spill(py::module_& module) {
  py::class_<Spill, std::shared_ptr<Spill>>(module, "Spill")
      .def(py::init(&open_spill), py::arg("directory"), py::arg("arena"), py::kw_only(),
           py::arg("engine") = "auto", py::arg("queue_depth") = 32,
           py::arg("block_bytes") = std::uint64_t{1} << 20, py::arg("spill_bytes") = 0,
           py::arg("verify") = true, py::arg("direct") = true, py::arg("register_buffers") = true,
           py::arg("fault_plan") = std::nullopt)
      .def(
          "write",
          [](Spill& self, std::uintptr_t address, std::uint64_t nbytes) {
            std::shared_ptr<Extent> extent;
            {
              py::gil_scoped_release nogil;
              extent = self.write(reinterpret_cast<const std::byte*>(address), nbytes);
            }
            return made(make_extent(std::move(extent)));
          },
          py::arg("address"), py::arg("nbytes"))
      .def(
          "stage",
          [](Spill& self, std::uint64_t nbytes, std::uint64_t lead) {
            std::shared_ptr<Extent> extent;
            {
              py::gil_scoped_release nogil;
              extent = self.stage(nbytes, lead);
            }
            return made(make_extent(std::move(extent)));
          },
          py::arg("nbytes"), py::arg("lead"))
      .def(
          "restage",
          [](Spill& self, py::handle buffer) {
            return made(make_extent(self.restage(restored_in(buffer.ptr()))));
          },
          py::arg("buffer"))
      .def(
          "reserve",
          [](Spill& self, std::uint64_t nbytes) {
            std::shared_ptr<Extent> extent;
            {
              py::gil_scoped_release nogil;
              extent = self.reserve(nbytes);
            }
            return made(make_extent(std::move(extent)));
          },
          py::arg("nbytes"))
      .def("fileno", [](const Spill& self) { return self.file().fd(); })
      .def("wait_within_limit", &Spill::wait_within_limit, NoGil())
      .def("flush", &Spill::flush)
      .def("drain", &Spill::drain, NoGil())
      .def("close", &Spill::close, NoGil())
      .def("stats", &spill_stats)
      .def("raise_write_error", &Spill::raise_write_error)
      .def("forget_write_error", &Spill::forget_write_error)
      .def(
          "page_cache_bytes", [](const Spill& self) { return self.file().page_cache_bytes(); },
          NoGil())
      .def_property_readonly("stall_s",
                             [](const Spill& self) {
                               const SpillStats stats = self.stats();
                               return stats.read_wait_s + stats.write_wait_s;
                             })
      .def_property_readonly("free_bytes",
                             [](const Spill& self) { return self.file().free_bytes(); })
      .def_property_readonly("engine", &Spill::engine_name)
      .def_property_readonly("engine_reason", &Spill::engine_reason)
      .def_property_readonly("direct", [](const Spill& self) { return self.file().direct(); })
      .def_property_readonly("direct_reason",
                             [](const Spill& self) { return self.file().facts().direct_reason; })
      .def_property_readonly("backing",
                             [](const Spill& self) { return self.file().facts().backing; })
      .def_property_readonly("filesystem",
                             [](const Spill& self) { return self.file().facts().filesystem; })
      .def_property_readonly("registered", &Spill::registered)
      .def_property_readonly("registration_errno", &Spill::register_code);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of offload.";
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const IoError& error) {
      set_os_error(error);
    }
  });
  if (!add_extent_types(module.ptr()) || !add_view_types(module.ptr()) ||
      !add_signal_safe_types(module.ptr())) {
    throw py::error_already_set();
  }
  bind_memory(module);
  bind_faults(module);
  bind_spill(module);
  bind_arithmetic(module);
  bind_attention(module);
  module.def("probe_engines", &probe_engines);
  module.def("inspect_directory", [](const std::string& path) {
    const DirectoryFacts facts = inspect_directory(path);
    return py::make_tuple(facts.path, facts.filesystem, facts.backing, facts.free_bytes,
                          facts.total_bytes, facts.direct, facts.direct_reason);
  });
  module.def("close_in_children", &close_in_children, py::arg("fd"));
  module.def("keep_in_children", &keep_in_children, py::arg("fd"));
  module.def("crc32c_path", &crc32c_path);
  module.def(
      "crc32c",
      [](std::uintptr_t address, std::size_t nbytes, std::uint32_t before) {
        return crc32c(before, reinterpret_cast<const void*>(address), nbytes);
      },
      py::arg("address"), py::arg("nbytes"), py::arg("before") = 0, NoGil());
}
