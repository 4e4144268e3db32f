// Makes whole optimizer steps without Python, for optimizers that have been stepped before.
//
// A step was made by torch's own code first, with the kernels of optimizers.c. It has told which
// tensors it passes to the kernel, and where it has them from. A prepared step holds all of that,
// and at each call compares what the optimizer holds now with it: the parameter groups, their
// options, the state, and the tensors' sizes, types and memory. Whatever is another object, or has
// another form, is left to torch's code. Only learning rates and other options may change; they are
// read again.
//
// Functions here run with the GIL held. Unlike other kernels, this file is compiled against torch,
// because all of this has to be read from torch's objects.

// torch/extension.h would take half a minute to compile.
#include <ATen/Parallel.h>
#include <ATen/core/TensorBody.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace py = pybind11;

namespace {

constexpr size_t SLOTS = 6; // of optimizers.c
constexpr size_t PARAMETER = 0, GRADIENT = 1;

using Kernel = int (*)(void* const* rows, const int64_t* sizes, int64_t count, const double* options,
                       int threads);

// The objects of a dictionary, compared by identity and in order. They are held, so that no other
// object can have their address. Nothing is hashed: the hash of a parameter is a function in Python.
struct Entries {
  py::object dictionary;
  std::vector<std::pair<py::object, py::object>> entries;

  void remember(PyObject* now) {
    dictionary = py::reinterpret_borrow<py::object>(now);
    entries.clear();
    PyObject *key, *value;
    Py_ssize_t place = 0;
    while (PyDict_Next(now, &place, &key, &value))
      entries.emplace_back(py::reinterpret_borrow<py::object>(key),
                           py::reinterpret_borrow<py::object>(value));
  }

  bool are_same(PyObject* now) const {
    if (now != dictionary.ptr() || PyDict_Size(now) != (Py_ssize_t)entries.size()) return false;
    PyObject *key, *value;
    Py_ssize_t place = 0;
    for (const auto& [known_key, known_value] : entries)
      if (!PyDict_Next(now, &place, &key, &value) || key != known_key.ptr() ||
          value != known_value.ptr())
        return false;
    return true;
  }
};

bool is_addressable(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.device().is_cpu() &&
      tensor.scalar_type() == at::kFloat && !tensor.is_neg() && !tensor.is_inference() &&
      !tensor.unsafeGetTensorImpl()->is_python_dispatch() &&
      !tensor.key_set().has_any(c10::DispatchKeySet(
          {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
           c10::DispatchKey::Functionalize, c10::DispatchKey::Fake}));
}

bool has_form_of(const at::Tensor& tensor, const at::Tensor& like) {
  return is_addressable(tensor) && tensor.sizes() == like.sizes() &&
      tensor.strides() == like.strides() && tensor.is_non_overlapping_and_dense();
}

struct State {
  size_t slot;
  bool is_number; // one for the whole parameter, such as a step counter
  at::Tensor tensor;
};

struct Row {
  at::Tensor parameter;
  std::vector<State> state;
};

struct Group {
  py::object dictionary;
  py::object list; // of its parameters
  std::vector<py::object> parameters;
  Entries options_known;
  std::vector<double> options;
  std::vector<Row> rows;
};

using Span = std::pair<uintptr_t, uintptr_t>;

class PreparedStep {
 public:
  // `read_options` returns the options of a group, or None if torch has to step it.
  PreparedStep(py::object groups, py::dict state, uintptr_t kernel, py::function read_options,
               int64_t serial_below)
      : groups_list_(std::move(groups)), state_(std::move(state)),
        kernel_(reinterpret_cast<Kernel>(kernel)), read_options_(std::move(read_options)),
        serial_below_(serial_below) {
    state_known_.remember(state_.ptr());
    for (const auto& [parameter, of_parameter] : state_known_.entries) {
      TORCH_CHECK(PyDict_Check(of_parameter.ptr()), "the state of a parameter is no dictionary");
      state_of_known_.emplace_back();
      state_of_known_.back().remember(of_parameter.ptr());
    }
  }

  // `rows` are those of the parameters that have gradients, in order; each is a list of tensors by
  // slot, with None where there is none. `numbers` are the slots that hold one number.
  void add_group(py::dict dictionary, std::vector<double> options, const py::list& rows,
                 const std::vector<size_t>& numbers) {
    Group group;
    group.dictionary = dictionary;
    group.list = dictionary["params"];
    for (auto parameter : group.list)
      group.parameters.push_back(py::reinterpret_borrow<py::object>(parameter));
    group.options_known.remember(dictionary.ptr());
    group.options = std::move(options);
    for (auto given : rows) {
      auto slots = given.cast<py::list>();
      TORCH_CHECK(slots.size() == SLOTS, "a row has ", SLOTS, " slots");
      Row row;
      row.parameter = THPVariable_Unpack(py::object(slots[PARAMETER]).ptr());
      for (size_t slot = GRADIENT + 1; slot < SLOTS; ++slot) {
        py::object tensor = slots[slot];
        if (tensor.is_none()) continue;
        bool is_number = std::find(numbers.begin(), numbers.end(), slot) != numbers.end();
        row.state.push_back({slot, is_number, THPVariable_Unpack(tensor.ptr())});
      }
      group.rows.push_back(std::move(row));
    }
    groups_.push_back(std::move(group));
  }

  // Steps, unless something is not as it was; returns whether it has. If it has not, nothing has
  // been written.
  bool step(const py::object& groups, const py::object& state) {
    if (is_stepping_) return false; // another thread, while this one is in a kernel without the GIL
    if (groups.ptr() != groups_list_.ptr() || !is_state_same(state.ptr())) return false;
    if (PyList_Size(groups_list_.ptr()) != (Py_ssize_t)groups_.size()) return false;
    for (size_t i = 0; i < groups_.size(); ++i)
      if (!is_group_same(PyList_GetItem(groups_list_.ptr(), i), groups_[i])) return false;
    if (!collect()) return false;
    size_t first = 0;
    if (groups_.size() > 1) { // all or none
      for (const auto& group : groups_) {
        if (run(group, first, 0) != 0) return false;
        first += group.rows.size();
      }
    }
    first = 0;
    const int threads = total_ >= serial_below_ ? at::get_num_threads() : 1;
    {
      Stepping stepping(is_stepping_);
      std::optional<py::gil_scoped_release> release; // other threads may load data meanwhile
      if (total_ >= serial_below_) release.emplace();
      for (const auto& group : groups_) {
        int status = run(group, first, threads);
        if (status < 0) throw std::bad_alloc();
        if (status != 0) return false;
        first += group.rows.size();
      }
    }
    for (const auto& group : groups_)
      for (const auto& row : group.rows) {
        row.parameter.unsafeGetTensorImpl()->bump_version();
        for (const auto& one : row.state) one.tensor.unsafeGetTensorImpl()->bump_version();
      }
    return true;
  }

 private:
  // Changed with the GIL held only.
  class Stepping {
   public:
    explicit Stepping(bool& is_stepping) : is_stepping_(is_stepping) { is_stepping_ = true; }
    ~Stepping() { is_stepping_ = false; }

   private:
    bool& is_stepping_;
  };

  bool is_state_same(PyObject* state) const {
    if (!state_known_.are_same(state)) return false;
    for (size_t i = 0; i < state_of_known_.size(); ++i)
      if (!state_of_known_[i].are_same(state_known_.entries[i].second.ptr())) return false;
    return true;
  }

  bool is_group_same(PyObject* now, Group& group) {
    if (now != group.dictionary.ptr()) return false;
    PyObject* list = PyDict_GetItemString(now, "params");
    if (list != group.list.ptr() || PyList_Size(list) != (Py_ssize_t)group.parameters.size())
      return false;
    for (size_t i = 0; i < group.parameters.size(); ++i)
      if (PyList_GetItem(list, i) != group.parameters[i].ptr()) return false;
    if (group.options_known.are_same(now)) return true;
    py::object options = read_options_(group.dictionary);
    if (options.is_none()) return false;
    group.options = options.cast<std::vector<double>>();
    group.options_known.remember(now);
    return true;
  }

  // Collects the addresses for the kernel; returns whether it can be given all of them.
  bool collect() {
    addresses_.clear();
    sizes_.clear();
    written_.clear();
    total_ = 0;
    for (const auto& group : groups_) {
      size_t next = 0;
      for (const auto& parameter : group.parameters) {
        const at::Tensor& tensor = THPVariable_Unpack(parameter.ptr());
        const at::Tensor& gradient = tensor.grad();
        const bool is_next = next < group.rows.size() &&
            group.rows[next].parameter.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl();
        if (gradient.defined() != is_next) return false;
        if (!is_next) continue;
        if (!add_row(group.rows[next++], gradient)) return false;
      }
      if (next != group.rows.size()) return false;
    }
    return share_no_memory();
  }

  bool add_row(const Row& row, const at::Tensor& gradient) {
    const at::Tensor& parameter = row.parameter;
    if (!has_form_of(parameter, parameter) || !has_form_of(gradient, parameter)) return false;
    const size_t start = addresses_.size();
    const int64_t size = parameter.numel();
    addresses_.resize(start + SLOTS, nullptr);
    addresses_[start + PARAMETER] = parameter.data_ptr();
    addresses_[start + GRADIENT] = gradient.data_ptr();
    add_span(parameter, size);
    for (const auto& [slot, is_number, tensor] : row.state) {
      if (is_number ? !is_addressable(tensor) || tensor.numel() != 1
                    : !has_form_of(tensor, parameter))
        return false;
      addresses_[start + slot] = tensor.data_ptr();
      add_span(tensor, tensor.numel());
    }
    sizes_.push_back(size);
    total_ += size;
    return true;
  }

  void add_span(const at::Tensor& tensor, int64_t size) {
    auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    if (size != 0) written_.emplace_back(begin, begin + 4 * size);
  }

  // Whether no tensor that is written shares memory with another, or with a gradient.
  bool share_no_memory() {
    if (written_ != written_known_) { // mostly they lie where they lay before
      written_known_.clear();
      sorted_ = written_;
      std::sort(sorted_.begin(), sorted_.end());
      for (size_t i = 1; i < sorted_.size(); ++i)
        if (sorted_[i - 1].second > sorted_[i].first) return false;
      written_known_ = written_;
    }
    for (size_t row = 0; row < sizes_.size(); ++row) {
      auto begin = reinterpret_cast<uintptr_t>(addresses_[row * SLOTS + GRADIENT]);
      auto end = begin + 4 * sizes_[row];
      auto after = std::lower_bound(sorted_.begin(), sorted_.end(), Span(end, 0));
      if (after != sorted_.begin() && std::prev(after)->second > begin && end > begin) return false;
    }
    return true;
  }

  // With no threads, only whether the coefficients are finite is found out.
  int run(const Group& group, size_t first, int threads) const {
    return kernel_(addresses_.data() + first * SLOTS, sizes_.data() + first, group.rows.size(),
                   group.options.data(), threads);
  }

  py::object groups_list_;
  py::dict state_;
  Kernel kernel_;
  py::function read_options_;
  int64_t serial_below_;
  Entries state_known_;
  std::vector<Entries> state_of_known_;
  std::vector<Group> groups_;
  std::vector<void*> addresses_;
  std::vector<int64_t> sizes_;
  std::vector<Span> written_, written_known_, sorted_;
  int64_t total_ = 0;
  bool is_stepping_ = false;
};

// Whether no class of the program can have a part in what is done with a tensor.
bool is_plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == ParameterClass || type == THPVariableClass;
}

// Calls `use` with each parameter of the groups; returns whether all are as torch makes them.
template <typename Use>
bool for_each_parameter(PyObject* groups, const Use& use) {
  static PyObject* const name = PyUnicode_InternFromString("params");
  if (!PyList_CheckExact(groups)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    PyObject* list = PyDict_CheckExact(group) ? PyDict_GetItem(group, name) : nullptr;
    if (list == nullptr || !PyList_CheckExact(list)) return false;
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list); ++j) {
      PyObject* parameter = PyList_GET_ITEM(list, j);
      if (!is_plain(parameter)) return false;
      use(THPVariable_Unpack(parameter));
    }
  }
  return true;
}

// Sets the gradients of all parameters to None, as Optimizer.zero_grad does; returns whether it
// has. If it has not, nothing has been changed.
bool drop_gradients(const py::object& groups) {
  if (!for_each_parameter(groups.ptr(), [](const at::Tensor&) {})) return false;
  std::vector<at::Tensor> dropped; // whatever their end calls must not change the lists meanwhile
  for_each_parameter(groups.ptr(), [&](const at::Tensor& parameter) {
    if (!parameter.grad().defined()) return;
    dropped.push_back(std::move(parameter.mutable_grad()));
    parameter.mutable_grad().reset();
  });
  return true;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("drop_gradients", &drop_gradients);
  py::class_<PreparedStep>(m, "PreparedStep")
      .def(py::init<py::object, py::dict, uintptr_t, py::function, int64_t>())
      .def("add_group", &PreparedStep::add_group)
      .def("step", &PreparedStep::step);
}
