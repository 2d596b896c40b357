// A graph as a list of operator calls, which PyTorch's dispatcher runs without Python and without a compiler.
// `lowering/native/plan.py` says what the calls are.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/ivalue.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <mutex>

#include "glue.h"

namespace mq_ao {
namespace {

using c10::IValue;
using Places = c10::List<int64_t>;

// Where an argument comes from: it is a constant, a value, or a list of both.
struct Argument {
  IValue constant;              // of a list: a tuple, in which those of values mean nothing
  std::vector<int64_t> places;  // of a list: -1 for a constant
  c10::TypePtr element;         // of a list
  bool tensor = false;          // whether the operator takes a tensor
};

int64_t floor_divide(int64_t a, int64_t b) {
  TORCH_CHECK(b != 0, "a size is divided by zero");
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

using Arithmetic = int64_t (*)(int64_t, int64_t);

// Operations on sizes.
Arithmetic arithmetic(const std::string& name) {
  if (name == "add") return [](int64_t a, int64_t b) { return a + b; };
  if (name == "sub") return [](int64_t a, int64_t b) { return a - b; };
  if (name == "mul") return [](int64_t a, int64_t b) { return a * b; };
  if (name == "floordiv") return floor_divide;
  if (name == "mod") return [](int64_t a, int64_t b) { return a - b * floor_divide(a, b); };
  if (name == "max") return [](int64_t a, int64_t b) { return std::max(a, b); };
  if (name == "min") return [](int64_t a, int64_t b) { return std::min(a, b); };
  TORCH_CHECK(false, "no operation on sizes is called ", name);
}

// Memory of large results, which is used again when nobody else holds it: memory that is mapped anew costs a page fault
// for every 4 kB of it. Tensors are new each time: those that Python has seen are never held by us alone.
class Spares {
 public:
  Tensor like(const Tensor& wanted) {
    const size_t bytes = wanted.numel() * wanted.element_size();
    return at::empty({0}, wanted.options()).set_(memory(bytes, wanted), 0, wanted.sizes(), {});
  }

 private:
  static constexpr size_t kMost = 8;  // two states of a model, each before and after a step, of two batch sizes

  c10::Storage memory(size_t bytes, const Tensor& wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const c10::Storage& storage : kept_)
      if (storage.nbytes() == bytes && storage.use_count() == 1) return storage;
    if (kept_.size() == kMost) kept_.erase(kept_.begin());
    kept_.push_back(at::empty(wanted.sizes(), wanted.options()).storage());
    return kept_.back();
  }

  std::mutex mutex_;
  std::vector<c10::Storage> kept_;
};

struct Step {
  std::optional<c10::OperatorHandle> op;  // none: `on_sizes`
  Arithmetic on_sizes = nullptr;
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // -1: nobody reads it
  bool unpacked = false;         // the one result is a list, whose items are the values
  bool memory = false;           // gives memory without values
  std::vector<int64_t> last;     // values that nobody reads later
};

// The elements of a list as the kernels take them.
IValue list_of(const c10::TypePtr& element, c10::ArrayRef<IValue> items) {
  switch (element->kind()) {
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType: {
      c10::List<int64_t> list;
      for (const IValue& item : items) list.push_back(item.toInt());
      return list;
    }
    case c10::TypeKind::FloatType: {
      c10::List<double> list;
      for (const IValue& item : items) list.push_back(item.isInt() ? double(item.toInt()) : item.toDouble());
      return list;
    }
    case c10::TypeKind::BoolType: {
      c10::List<bool> list;
      for (const IValue& item : items) list.push_back(item.toBool());
      return list;
    }
    case c10::TypeKind::TensorType: {
      c10::List<Tensor> list;
      for (const IValue& item : items) list.push_back(item.toTensor());
      return list;
    }
    case c10::TypeKind::OptionalType: {
      c10::List<std::optional<Tensor>> list;
      for (const IValue& item : items)
        list.push_back(item.isNone() ? std::optional<Tensor>() : std::optional<Tensor>(item.toTensor()));
      return list;
    }
    default: TORCH_CHECK(false, "an operator takes a list of ", element->str(), ", which no plan holds");
  }
}

bool is_tensor(const c10::TypePtr& type) {
  if (auto optional = type->cast<c10::OptionalType>()) return is_tensor(optional->getElementType());
  return type->kind() == c10::TypeKind::TensorType;
}

// A number where an operator takes a tensor, as Python gives it: one that does not widen the other operand.
IValue wrapped(const IValue& number) {
  Tensor tensor = c10::scalar_to_tensor(number.toScalar());
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

// A constant as an argument of that type.
IValue constant_of(const c10::TypePtr& type, const IValue& given) {
  if (auto optional = type->cast<c10::OptionalType>())
    return given.isNone() ? given : constant_of(optional->getElementType(), given);
  if (auto list = type->cast<c10::ListType>()) {
    TORCH_CHECK(given.isTuple(), "an operator takes a list, but the plan gives it something else");
    return list_of(list->getElementType(), given.toTupleRef().elements());
  }
  if (type->kind() == c10::TypeKind::FloatType && given.isInt()) return double(given.toInt());
  return is_tensor(type) && given.isScalar() ? wrapped(given) : given;
}

const c10::ListType* as_list(const c10::TypePtr& type) {
  if (auto optional = type->cast<c10::OptionalType>()) return as_list(optional->getElementType());
  return type->castRaw<c10::ListType>();
}

class Plan : public torch::CustomClassHolder {
 public:
  // The first values are the weights, then come the inputs, then what the steps give.
  Plan(std::vector<Tensor> weights, int64_t inputs) : inputs_(inputs) {
    TORCH_CHECK(inputs >= 0, "a plan has ", inputs, " inputs");
    for (Tensor& weight : weights) weights_.emplace_back(std::move(weight));
    values_ = int64_t(weights_.size()) + inputs_;
  }

  // Adds the call of an operator. `constants` is a tuple of its arguments, lists as tuples; `places` says which of
  // them are values: it has the number of one, or those of a list's elements, -1 for constants; none for a constant.
  // Last arguments may be missing: an operator has got more of them, with defaults, since the plan was saved.
  void call(const std::string& name, const std::string& overload, const IValue& constants,
            const c10::List<Places>& places, const std::vector<int64_t>& results) {
    Step step;
    step.op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& schema = step.op->schema();
    const auto& given = constants.toTupleRef().elements();
    const auto& known = schema.arguments();
    const size_t count = given.size();
    const bool complete = count == known.size() || (count < known.size() && known[count].default_value());
    TORCH_CHECK(complete && places.size() == count, name, " takes ", known.size(), " arguments");
    for (size_t i = 0; i < count; ++i) {
      const c10::TypePtr& type = schema.arguments()[i].type();
      const std::vector<int64_t> from = places.get(i).vec();
      if (from.empty())
        step.arguments.push_back({constant_of(type, given[i]), {}, nullptr});
      else if (const auto* list = as_list(type))
        step.arguments.push_back(listed(given[i], from, list->getElementType()));
      else
        step.arguments.push_back(single(from, is_tensor(type)));
    }
    for (size_t i = count; i < known.size(); ++i)
      step.arguments.push_back({*known[i].default_value(), {}, nullptr});
    step.memory = name == "aten::empty_like";
    step.unpacked = schema.returns().size() == 1 && schema.returns()[0].type()->kind() == c10::TypeKind::ListType;
    TORCH_CHECK(step.unpacked || results.size() == schema.returns().size(), name, " gives ", schema.returns().size(),
                " values");
    add(std::move(step), results);
  }

  // Adds an operation on two sizes: numbers, or values where `places` names them.
  void size(const std::string& name, const std::vector<int64_t>& numbers, const c10::List<Places>& places,
            int64_t result) {
    Step step;
    step.on_sizes = arithmetic(name);
    TORCH_CHECK(numbers.size() == 2 && places.size() == 2, name, " takes two sizes");
    for (size_t i = 0; i < 2; ++i) {
      const std::vector<int64_t> from = places.get(i).vec();
      step.arguments.push_back(from.empty() ? Argument{IValue(numbers[i]), {}, nullptr} : single(from, false));
    }
    add(std::move(step), {result});
  }

  // Ends the plan: which values it gives.
  void finish(std::vector<int64_t> outputs) {
    for (const int64_t place : outputs) check(place);
    outputs_ = std::move(outputs);
    std::vector<bool> needed(values_, false);
    for (const int64_t place : outputs_) needed[place] = true;
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      const auto visit = [&](int64_t place) {
        if (place < 0 || needed[place]) return;
        needed[place] = true;
        step->last.push_back(place);
      };
      for (const int64_t place : step->results) visit(place);
      for (const Argument& argument : step->arguments)
        for (const int64_t place : argument.places) visit(place);
    }
  }

  std::vector<Tensor> run(std::vector<Tensor> inputs) const {
    TORCH_CHECK(int64_t(inputs.size()) == inputs_, "the plan takes ", inputs_, " inputs, not ", inputs.size());
    // Nothing here has a gradient.
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Workspace workspace;
    std::vector<IValue> values(values_ - weights_.size());
    const auto at = [&](int64_t place) -> const IValue& {
      const int64_t own = place - int64_t(weights_.size());
      return own < 0 ? weights_[place] : values[own];
    };
    const auto put = [&](int64_t place, IValue value) {
      if (place >= 0) values[place - weights_.size()] = std::move(value);
    };
    for (size_t i = 0; i < inputs.size(); ++i) values[i] = std::move(inputs[i]);
    torch::jit::Stack stack;
    for (const Step& step : steps_) {
      stack.clear();
      for (const Argument& argument : step.arguments) stack.push_back(read(argument, at));
      if (!step.op) {
        put(step.results[0], step.on_sizes(stack[0].toInt(), stack[1].toInt()));
      } else if (step.memory) {
        put(step.results[0], spares_.like(stack[0].toTensor()));
      } else {
        step.op->callBoxed(stack);
        if (step.unpacked) {
          const c10::List<IValue> items = stack.at(0).toList();
          TORCH_CHECK(items.size() == step.results.size(), "a list has ", items.size(), " items");
          for (size_t i = 0; i < items.size(); ++i) put(step.results[i], items.get(i));
        } else {
          for (size_t i = 0; i < step.results.size(); ++i) put(step.results[i], std::move(stack.at(i)));
        }
      }
      for (const int64_t place : step.last)
        if (place >= int64_t(weights_.size())) values[place - weights_.size()] = IValue();
    }
    std::vector<Tensor> outputs;
    for (const int64_t place : outputs_) outputs.push_back(at(place).toTensor());
    return outputs;
  }

 private:
  void check(int64_t place) const {
    TORCH_CHECK(place >= 0 && place < values_, "the plan reads value ", place, " of ", values_);
  }

  Argument single(const std::vector<int64_t>& from, bool tensor) const {
    TORCH_CHECK(from.size() == 1, "an argument is one value");
    check(from[0]);
    return {{}, from, nullptr, tensor};
  }

  Argument listed(const IValue& constants, const std::vector<int64_t>& from, const c10::TypePtr& element) const {
    TORCH_CHECK(constants.isTuple() && constants.toTupleRef().elements().size() == from.size(),
                "the constants and the values of a list do not fit together");
    for (const int64_t place : from)
      if (place != -1) check(place);
    return {constants, from, element};
  }

  void add(Step step, const std::vector<int64_t>& results) {
    for (const int64_t place : results) {
      TORCH_CHECK(place == -1 || place == values_, "a step gives value ", place, " in the place of ", values_);
      if (place == values_) ++values_;
    }
    step.results = results;
    steps_.push_back(std::move(step));
  }

  template <typename At>
  static IValue read(const Argument& argument, At&& at) {
    if (argument.places.empty()) return argument.constant;
    if (!argument.element) {
      const IValue& value = at(argument.places[0]);
      return argument.tensor && value.isScalar() ? wrapped(value) : value;
    }
    const auto& constants = argument.constant.toTupleRef().elements();
    c10::SmallVector<IValue, 8> items;
    for (size_t i = 0; i < argument.places.size(); ++i)
      items.push_back(argument.places[i] < 0 ? constants[i] : at(argument.places[i]));
    return list_of(argument.element, items);
  }

  std::vector<IValue> weights_;
  int64_t inputs_, values_;
  std::vector<Step> steps_;
  std::vector<int64_t> outputs_;
  mutable Spares spares_;
};

TORCH_LIBRARY_FRAGMENT(mq_ao, m) {
  m.class_<Plan>("Plan")
      .def(torch::init<std::vector<Tensor>, int64_t>())
      .def("call", &Plan::call)
      .def("size", &Plan::size)
      .def("finish", &Plan::finish)
      .def("run", &Plan::run);
}

}  // namespace
}  // namespace mq_ao
