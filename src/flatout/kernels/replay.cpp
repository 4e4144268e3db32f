// Runs a captured forward and backward pass as flat lists of torch's operators.
//
// A list is called below autograd and autocast: both have been captured. In the graph of autograd, a
// whole pass is one node. Its backward is the second list, or, where that cannot be used (a gradient
// of a gradient, or outputs without gradients), autograd itself over a second call.

#include <algorithm>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ScalarOps.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

namespace py = pybind11;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

constexpr int NOTHING = -1;

// What an operator is called with: the value of a slot, a list of slots, or a constant.
struct Argument {
  int slot = NOTHING;
  bool is_list = false;
  bool is_list_of_optional = false;
  std::vector<int> slots;
  c10::IValue constant;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int> results;  // a slot, or NOTHING, for each value that it returns
  bool returns_list = false; // its one result is a list, whose elements go to the slots
  std::vector<int> written;  // slots of tensors that it writes in place
  std::vector<int> last_used; // slots that no later call reads
};

using Slots = std::vector<c10::IValue>;

at::Tensor tensor_in(const Slots& slots, int slot) {
  return slot == NOTHING || slots[slot].isNone() ? at::Tensor() : slots[slot].toTensor();
}

class CallList {
 public:
  void add_call(const std::string& name, const std::string& overload, const py::list& arguments,
                std::vector<int> results, bool returns_list) {
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    Call call{op};
    const auto& formals = op.schema().arguments();
    TORCH_CHECK(formals.size() == arguments.size(), name, " takes ", formals.size(), " arguments");
    for (size_t i = 0; i < formals.size(); ++i) {
      call.arguments.push_back(to_argument(formals[i], arguments[i].cast<py::tuple>()));
      const auto* alias = formals[i].alias_info();
      if (alias && alias->isWrite()) {
        const auto& argument = call.arguments.back();
        TORCH_CHECK(argument.slot != NOTHING, name, " writes what is no tensor of the list");
        call.written.push_back(argument.slot);
      }
    }
    call.results = std::move(results);
    call.returns_list = returns_list;
    calls_.push_back(std::move(call));
  }

  void finish(int slot_count, std::vector<int> outputs) {
    slot_count_ = slot_count;
    outputs_ = std::move(outputs);
    std::vector<int> last(slot_count, NOTHING);
    for (int i = 0; i < (int)calls_.size(); ++i) {
      for (const auto& argument : calls_[i].arguments) {
        if (argument.slot != NOTHING) last[argument.slot] = i;
        for (int slot : argument.slots)
          if (slot != NOTHING) last[slot] = i;
      }
      for (int slot : calls_[i].results)
        if (slot != NOTHING) last[slot] = i;
    }
    for (int slot : outputs_)
      if (slot != NOTHING) last[slot] = NOTHING;
    for (int slot = 0; slot < slot_count; ++slot)
      if (last[slot] != NOTHING) calls_[last[slot]].last_used.push_back(slot);
  }

  int slot_count() const { return slot_count_; }
  size_t size() const { return calls_.size(); }

  // Makes the calls.
  variable_list run(Slots slots) const {
    slots.resize(slot_count_);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
    torch::jit::Stack stack;
    stack.reserve(16);
    for (const auto& call : calls_) {
      for (const auto& argument : call.arguments) push(stack, argument, slots);
      call.op.callBoxed(stack);
      pop(stack, call, slots);
      for (int slot : call.written) bump_version(slots[slot].toTensor());
      for (int slot : call.last_used) slots[slot] = c10::IValue();
    }
    variable_list outputs;
    outputs.reserve(outputs_.size());
    for (int slot : outputs_) outputs.push_back(tensor_in(slots, slot));
    return outputs;
  }

 private:
  // Given as ("slot", number), ("list", numbers), ("value", object) or ("default", None).
  static Argument to_argument(const c10::Argument& formal, const py::tuple& given) {
    Argument argument;
    auto kind = given[0].cast<std::string>();
    py::object value = given[1];
    if (kind == "slot") {
      argument.slot = value.cast<int>();
    } else if (kind == "list") {
      argument.is_list = true;
      argument.slots = value.cast<std::vector<int>>();
      auto list = formal.type()->cast<c10::ListType>();
      TORCH_CHECK(list, formal.name(), " is no list");
      argument.is_list_of_optional =
          list->getElementType()->kind() == c10::TypeKind::OptionalType;
    } else if (kind == "default") {
      TORCH_CHECK(formal.default_value().has_value(), formal.name(), " has no default");
      argument.constant = *formal.default_value();
    } else if (is_number(value) && takes_tensor(formal)) {
      auto scalar = torch::jit::toIValue(value, c10::NumberType::get()).toScalar();
      argument.constant = at::native::wrapped_scalar_tensor(scalar);
    } else {
      argument.constant = torch::jit::toIValue(value, formal.type());
    }
    return argument;
  }

  static bool is_number(const py::object& value) {
    return py::isinstance<py::bool_>(value) || py::isinstance<py::int_>(value) ||
           py::isinstance<py::float_>(value) || PyComplex_Check(value.ptr());
  }

  static bool takes_tensor(const c10::Argument& formal) {
    return formal.type()->isSubtypeOf(*c10::TensorType::get());
  }

  // Below autograd, torch does not count what is written in place.
  static void bump_version(const at::Tensor& tensor) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }

  static void push(torch::jit::Stack& stack, const Argument& argument, const Slots& slots) {
    if (argument.slot != NOTHING) {
      stack.push_back(slots[argument.slot]);
    } else if (!argument.is_list) {
      stack.push_back(argument.constant);
    } else if (argument.is_list_of_optional) {
      c10::List<std::optional<at::Tensor>> list;
      list.reserve(argument.slots.size());
      for (int slot : argument.slots)
        list.push_back(slot == NOTHING ? std::nullopt
                                       : std::optional<at::Tensor>(slots[slot].toTensor()));
      stack.emplace_back(std::move(list));
    } else {
      c10::List<at::Tensor> list;
      list.reserve(argument.slots.size());
      for (int slot : argument.slots) list.push_back(slots[slot].toTensor());
      stack.emplace_back(std::move(list));
    }
  }

  static void pop(torch::jit::Stack& stack, const Call& call, Slots& slots) {
    const size_t count = call.results.size();
    if (call.returns_list) {
      auto list = stack.back().toTensorList();
      for (size_t i = 0; i < count; ++i)
        if (call.results[i] != NOTHING) slots[call.results[i]] = at::Tensor(list[i]);
    } else {
      const size_t first = stack.size() - count;
      for (size_t i = 0; i < count; ++i)
        if (call.results[i] != NOTHING) slots[call.results[i]] = std::move(stack[first + i]);
    }
    stack.clear();
  }

  std::vector<Call> calls_;
  std::vector<int> outputs_;
  int slot_count_ = 0;
};

// What a saved output is.
enum Kind { INPUT, WRITTEN_INPUT, RETURNED, INTERMEDIATE };

struct Pass : c10::intrusive_ptr_target {
  ~Pass() override {
    if (!Py_IsInitialized()) {
      again.release();
      return;
    }
    py::gil_scoped_acquire acquire; // autograd may have been the last to need it
    again = py::function();
  }

  CallList forward, backward;
  size_t returned = 0; // the outputs of the forward list that are the program's; the rest is saved
  bool has_backward = false;
  std::vector<bool> is_differentiable;             // of the returned outputs
  std::vector<size_t> tangents;                    // outputs whose gradients backward is given
  py::function again; // makes the same calls under autograd
  std::vector<size_t> written;       // inputs that the forward list writes
  std::vector<int> kinds;            // of the outputs that are saved
  std::vector<size_t> viewed;        // inputs of which backward uses a view
  std::vector<size_t> viewed_outputs; // returned outputs that backward uses, or uses a view of
  std::vector<size_t> repeated_inputs; // inputs that have a further gradient each
  std::vector<size_t> unused; // differentiable outputs whose gradients backward is not given
  bool draws_numbers = false;
  std::atomic<int64_t> repetitions{0};
  std::atomic<bool> made_graphs{false}; // whether a repetition was for gradients of gradients
  std::atomic<uint64_t> used{0}; // a bit for each output that had a gradient in the last repetition
};

using PassPointer = c10::intrusive_ptr<Pass>;

std::atomic<int64_t> all_repetitions{0}; // of all passes

Slots to_slots(at::TensorList tensors, const CallList& list) {
  Slots slots;
  slots.reserve(list.slot_count());
  for (const auto& tensor : tensors) slots.emplace_back(tensor);
  return slots;
}

// Puts the generator into an earlier state for as long as it lives.
class GeneratorState {
 public:
  explicit GeneratorState(const at::Tensor& state) {
    if (!state.defined()) return;
    now_ = get();
    set(state);
  }
  ~GeneratorState() {
    if (now_.defined()) set(now_);
  }
  static at::Tensor get() {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }

 private:
  static void set(const at::Tensor& state) {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }
  at::Tensor now_;
};

variable_list make_again(const Pass& pass, const variable_list& inputs);

torch::autograd::Edge edge_of(const at::Tensor& input) {
  return input.requires_grad() ? torch::autograd::impl::gradient_edge(input)
                               : torch::autograd::Edge();
}

// What a pass has saved for its backward. While the program hooks what is saved
// (torch.autograd.graph.saved_tensors_hooks), all of it goes through SavedVariable. Otherwise only
// inputs do, of which torch counts what is written to them: nobody else has the rest.
struct Saved {
  at::Tensor own;
  SavedVariable of_program;
  bool is_own = false;
};

// The node of a pass in the graph of autograd. Its inputs are those of the forward list, and the
// inputs that are used several times once more for each further use: autograd adds up the gradients
// of all uses one by one, also over several passes.
class ReplayedPass : public torch::autograd::Node {
 public:
  ReplayedPass(PassPointer pass, variable_list inputs)
      : pass_(std::move(pass)), inputs_(std::move(inputs)) {}

  std::string name() const override { return "ReplayedPassBackward"; }

  // Saves the outputs of the forward list from `pass->returned` on, and the generator's state before.
  void save(variable_list& outputs, at::Tensor generator) {
    generator_ = std::move(generator);
    for (size_t i : pass_->viewed) watch(inputs_[i]);
    for (size_t i : pass_->viewed_outputs) watch(outputs[i].detach());
    const bool are_hooked = at::SavedTensorDefaultHooks::is_enabled() &&
        at::SavedTensorDefaultHooks::get_hooks().has_value();
    saved_.resize(outputs.size() - pass_->returned);
    for (size_t k = 0; k < saved_.size(); ++k) {
      at::Tensor output = std::move(outputs[pass_->returned + k]);
      const int kind = pass_->kinds[k];
      if (kind == WRITTEN_INPUT) output = output.variable_data(); // nor does torch count its writes
      if (kind == RETURNED) output = output.detach(); // without this node, which would hold itself
      saved_[k].is_own = kind != INPUT && !are_hooked;
      if (saved_[k].is_own)
        saved_[k].own = std::move(output);
      else
        saved_[k].of_program = SavedVariable(output, /*is_output=*/false);
    }
  }

  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
    for (const auto& [tensor, version] : watched_)
      TORCH_CHECK(tensor._version() == version,
                  "one of the variables needed for gradient computation has been modified by an "
                  "inplace operation");
    bool is_usual = !at::GradMode::is_enabled();
    for (size_t i : pass_->tangents) is_usual = is_usual && gradients[i].defined();
    for (size_t i : pass_->unused) is_usual = is_usual && !gradients[i].defined();
    auto found = is_usual ? replay(gradients) : repeat(*pass_, inputs_, gradients, generator_);
    found.resize(inputs_.size() + pass_->repeated_inputs.size());
    return found;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    is_released_ = true;
    saved_.clear();
    watched_.clear();
    inputs_.clear();
    generator_.reset();
  }

 private:
  void watch(const at::Tensor& tensor) { watched_.emplace_back(tensor, tensor._version()); }

  variable_list replay(variable_list& gradients) {
    Slots slots;
    slots.reserve(pass_->backward.slot_count());
    for (auto& one : saved_) slots.emplace_back(one.is_own ? one.own : one.of_program.unpack());
    for (size_t i : pass_->tangents) slots.emplace_back(std::move(gradients[i]));
    return pass_->backward.run(std::move(slots));
  }

  // Makes the calls of forward again under autograd, and takes its gradients.
  static variable_list repeat(Pass& pass, const variable_list& inputs,
                              const variable_list& gradients, const at::Tensor& generator) {
    pass.repetitions++;
    all_repetitions++;
    const bool creates_graph = at::GradMode::is_enabled();
    if (creates_graph) pass.made_graphs = true;
    uint64_t used = 0;
    for (size_t i = 0; i < std::min<size_t>(pass.returned, 64); ++i)
      used |= uint64_t(gradients[i].defined() && !creates_graph) << i;
    pass.used = used;
    at::AutoGradMode with_gradients(true);
    GeneratorState as_then(generator);
    variable_list given = inputs, wanted;
    std::vector<size_t> places;
    for (size_t i : pass.written) given[i] = given[i].detach().clone();
    for (size_t i = 0; i < given.size(); ++i) {
      if (!given[i].requires_grad()) continue;
      if (!creates_graph) given[i] = given[i].detach().requires_grad_();
      wanted.push_back(given[i]);
      places.push_back(i);
    }
    auto made = make_again(pass, given);
    variable_list outputs, of_outputs;
    for (size_t i = 0; i < pass.returned; ++i) {
      if (!gradients[i].defined()) continue;
      outputs.push_back(made[i]);
      of_outputs.push_back(gradients[i]);
    }
    variable_list result(inputs.size());
    if (outputs.empty()) return result;
    auto found = torch::autograd::grad(outputs, wanted, of_outputs, creates_graph, creates_graph,
                                       /*allow_unused=*/true);
    for (size_t k = 0; k < places.size(); ++k) result[places[k]] = found[k];
    return result;
  }

  PassPointer pass_;
  variable_list inputs_;
  std::vector<Saved> saved_;
  std::vector<std::pair<at::Tensor, int64_t>> watched_; // which must keep these versions
  at::Tensor generator_;
  bool is_released_ = false;
};

// Torch holds nodes by one of two kinds of pointers, depending on its version.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class Pointer, class Node = ReplayedPass>
Pointer make_node(PassPointer pass, variable_list inputs) {
  auto* node = new Node(std::move(pass), std::move(inputs));
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(node, [](auto* one) { deleteNode(one); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

template <class Pointer>
void tell_hooks_of(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

variable_list run_pass(const PassPointer& pass, variable_list inputs) {
  const bool records = pass->has_backward && at::GradMode::is_enabled() &&
      std::any_of(inputs.begin(), inputs.end(), [](const auto& one) { return one.requires_grad(); });
  at::Tensor generator;
  if (records && pass->draws_numbers) generator = GeneratorState::get();
  variable_list outputs;
  {
    at::AutoGradMode without_gradients(false);
    outputs = pass->forward.run(to_slots(inputs, pass->forward));
  }
  if (!records) {
    outputs.resize(pass->returned);
    return outputs;
  }
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size() + pass->repeated_inputs.size());
  for (const auto& input : inputs) edges.push_back(edge_of(input));
  for (size_t i : pass->repeated_inputs) edges.push_back(edge_of(inputs[i]));
  auto node = make_node<NodePointer>(pass, std::move(inputs));
  auto& own = static_cast<ReplayedPass&>(*node);
  own.set_next_edges(std::move(edges));
  for (size_t i = 0; i < pass->returned; ++i)
    torch::autograd::set_history(pass->is_differentiable[i] ? outputs[i] : at::Tensor(), node);
  own.save(outputs, std::move(generator));
  tell_hooks_of(node);
  outputs.resize(pass->returned);
  return outputs;
}

variable_list make_again(const Pass& pass, const variable_list& inputs) {
  py::gil_scoped_acquire acquire;
  py::tuple arguments(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    arguments[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(inputs[i]));
  variable_list outputs;
  for (auto output : pass.again(*arguments)) outputs.push_back(THPVariable_Unpack(output.ptr()));
  return outputs;
}

// What Python sees of a pass.
struct PythonPass {
  PassPointer pass = c10::make_intrusive<Pass>();

  void set_backward(py::function again, std::vector<bool> is_differentiable,
                    std::vector<size_t> tangents, std::vector<size_t> written,
                    std::vector<int> kinds, std::vector<size_t> viewed,
                    std::vector<size_t> viewed_outputs, std::vector<size_t> repeated_inputs) {
    pass->again = std::move(again);
    pass->has_backward = true;
    pass->is_differentiable = std::move(is_differentiable);
    pass->tangents = std::move(tangents);
    for (size_t i = 0; i < pass->returned; ++i)
      if (pass->is_differentiable[i] &&
          std::find(pass->tangents.begin(), pass->tangents.end(), i) == pass->tangents.end())
        pass->unused.push_back(i);
    pass->written = std::move(written);
    pass->kinds = std::move(kinds);
    pass->viewed = std::move(viewed);
    pass->viewed_outputs = std::move(viewed_outputs);
    pass->repeated_inputs = std::move(repeated_inputs);
  }
};

// The function that runs a pass, without pybind11's search for overloads. `self` is a capsule.
PyObject* call_pass(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto& pass = *static_cast<PassPointer*>(PyCapsule_GetPointer(self, nullptr));
  variable_list inputs;
  inputs.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    TORCH_CHECK_TYPE(THPVariable_Check(arguments[i]), "a pass takes tensors");
    inputs.push_back(THPVariable_Unpack(arguments[i]));
  }
  variable_list outputs;
  {
    pybind11::gil_scoped_release release;
    outputs = run_pass(pass, std::move(inputs));
  }
  PyObject* result = PyTuple_New(outputs.size());
  if (result == nullptr) return nullptr;
  for (size_t i = 0; i < outputs.size(); ++i)
    PyTuple_SET_ITEM(result, i, THPVariable_Wrap(std::move(outputs[i])));
  return result;
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_pass_definition = {
    "replayed_pass", (PyCFunction)(void*)call_pass, METH_FASTCALL, nullptr};

py::object to_function(const PythonPass& python) {
  auto* pointer = new PassPointer(python.pass);
  auto* capsule = PyCapsule_New(pointer, nullptr, [](PyObject* own) {
    delete static_cast<PassPointer*>(PyCapsule_GetPointer(own, nullptr));
  });
  auto* function = PyCFunction_New(&call_pass_definition, capsule);
  Py_XDECREF(capsule);
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("repetitions", [] { return all_repetitions.load(); });
  py::class_<CallList>(m, "CallList")
      .def("add_call", &CallList::add_call)
      .def("finish", &CallList::finish)
      .def("__len__", &CallList::size);
  py::class_<PythonPass>(m, "Pass")
      .def(py::init<>())
      .def_property_readonly(
          "forward", [](PythonPass& self) { return &self.pass->forward; },
          py::return_value_policy::reference_internal)
      .def_property_readonly(
          "backward", [](PythonPass& self) { return &self.pass->backward; },
          py::return_value_policy::reference_internal)
      .def_property(
          "returned", [](const PythonPass& self) { return self.pass->returned; },
          [](PythonPass& self, size_t count) { self.pass->returned = count; })
      .def_property(
          "draws_numbers", [](const PythonPass& self) { return self.pass->draws_numbers; },
          [](PythonPass& self, bool draws) { self.pass->draws_numbers = draws; })
      .def_property_readonly(
          "repetitions", [](const PythonPass& self) { return self.pass->repetitions.load(); })
      .def_property_readonly(
          "made_graphs", [](const PythonPass& self) { return self.pass->made_graphs.load(); })
      .def_property_readonly("used", [](const PythonPass& self) { return self.pass->used.load(); })
      .def("set_backward", &PythonPass::set_backward)
      .def_property_readonly("function", &to_function)
      .def("__call__", [](const PythonPass& self, const py::args& arguments) {
        return to_function(self)(*arguments);
      });
}
