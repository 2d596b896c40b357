// Continues prompts with an mq-ao program (.pte) of a byte-level model and prints the text as it is made.
//
//   runner MODEL.pte --prompt TEXT [--prompt TEXT ...] [--tokens N] [--temperature T] [--seed S]
//
// `LanguageModel` is what an app takes over: load, reset, feed the prompt, then token by token.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

// Of the operator library; see LanguageModel.
extern "C" int mq_ao_share_packed_weights(int on);

namespace {

using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Result;
using std::string;

constexpr char kUsage[] =
    "usage: runner MODEL.pte --prompt TEXT [--prompt TEXT ...] [--tokens N] [--temperature T] [--seed S]\n"
    "\n"
    "Prints the text that a byte-level model continues each prompt with.\n"
    "\n"
    "  MODEL.pte          program made by mq-ao for ExecuTorch, batch 1\n"
    "  --prompt TEXT      text to continue; given again, another text, continued from a fresh state\n"
    "  --tokens N         tokens to make for each prompt (128)\n"
    "  --temperature T    0 takes the likeliest token, above 0 draws one (0)\n"
    "  --seed S           seed of the draw (0)\n"
    "\n"
    "Exit codes: 0, 1 (the program failed while it ran), 2 (bad arguments, or not a program for this runner).\n";

// Token between documents. It starts every prompt, as it started every text that the model was trained on.
constexpr int64_t kSeparator = 0;
constexpr int64_t kBytes = 256;

// What the user can mend; exit code 2.
struct BadInput : std::runtime_error {
  using runtime_error::runtime_error;
};

// ---- what the runtime logs ----

// The runtime says what is wrong in its log, and gives back no more than a number. The first error is the cause.
string first_error;

void keep_first_error(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line,
                      const char* message, size_t length) {
  if (level == kFatal) std::fprintf(stderr, "%s:%zu: %.*s\n", file, line, int(length), message);
  if (level == kError && first_error.empty()) first_error.assign(message, length);
}

string reason(Error error) {
  string text = first_error.empty() ? executorch::runtime::to_string(error) : first_error;
  // A file that is something else puts its bytes into messages; one line of text is wanted.
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

template <typename Exception = std::runtime_error>
void check(Error error, const string& what) {
  if (error != Error::Ok) throw Exception(what + ": " + reason(error));
  // What succeeds may have logged all the same.
  first_error.clear();
}

template <typename Exception = std::runtime_error, typename T>
T value(Result<T> result, const string& what) {
  check<Exception>(result.error(), what);
  return std::move(*result);
}

// ---- the model ----

class LanguageModel {
 public:
  explicit LanguageModel(const string& path)
      : path_(path),
        // The methods keep the model's state in one memory: without shared arenas each would have a state of its own,
        // and decode would not know of the prompt. The file is mapped, so that weights are read as they are needed.
        module_(path, Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true) {
    std::error_code unreadable;
    if (!std::filesystem::is_regular_file(path, unreadable)) throw BadInput("there is no file " + path);
    // Files come from anywhere: offsets that lead out of a damaged one must not be followed.
    check<BadInput>(module_.load(executorch::runtime::Program::Verification::InternalConsistency),
                    path + " is not an ExecuTorch program");
    const auto names = value<BadInput>(module_.method_names(), path + " cannot be read");
    for (const char* name : {"prefill", "decode", "reset", "get_max_seq_len", "get_vocab_size", "mq_ao_info"})
      if (!names.count(name)) throw BadInput(path + " is not a program of mq-ao: it has no method " + name);
    // Prefill and decode hold the same weights, which XNNPACK packs for each method that it loads. From here on it
    // packs what is equal once, so that the weights are in memory once.
    check(Error(mq_ao_share_packed_weights(1)), "XNNPACK does not share packed weights");
    // Loaded before they are timed. This is also where an operator that is missing from the build is found.
    for (const char* name : {"prefill", "decode", "reset"})
      check<BadInput>(module_.load_method(name), path + ": method " + name + " does not load");
    max_length_ = constant("get_max_seq_len");
    vocab_size_ = constant("get_vocab_size");
    check_shapes();
  }

  int64_t vocab_size() const { return vocab_size_; }

  // Forgets what was fed: the state is zero, as before the first token of a text.
  void reset() { run("reset", {}); }

  // Feeds a prompt and returns the logits of the token after it, valid until the next call.
  std::span<const float> prefill(std::span<int64_t> tokens) {
    std::span<const float> logits;
    // The state carries over, so a prompt that is longer than the program's longest prefill goes in pieces.
    while (!tokens.empty()) {
      const auto piece = tokens.first(std::min(tokens.size(), size_t(max_length_)));
      // Logits are computed at these positions only; of a prompt, only the last matters.
      int64_t last = int64_t(piece.size()) - 1;
      logits = run("prefill", {ids(piece), ids({&last, 1}, /*axes=*/1)});
      tokens = tokens.subspan(piece.size());
    }
    return logits;
  }

  // Feeds one token; as `prefill`.
  std::span<const float> decode(int64_t token) { return run("decode", {ids({&token, 1})}); }

 private:
  // Token ids (1, length), or positions (length,). The tensor refers to `values`.
  static executorch::extension::TensorPtr ids(std::span<int64_t> values, int axes = 2) {
    std::vector<executorch::aten::SizesType> sizes(axes, 1);
    sizes.back() = int32_t(values.size());
    return executorch::extension::from_blob(values.data(), sizes, executorch::aten::ScalarType::Long);
  }

  int64_t constant(const char* name) {
    const EValue found = value<BadInput>(module_.get(name), path_ + ": method " + name + " fails");
    if (!found.isInt() || found.toInt() < 1) throw BadInput(path_ + ": " + name + " is not a positive integer");
    return found.toInt();
  }

  void check_shapes() {
    const auto meta = value<BadInput>(module_.method_meta("decode"), path_ + " cannot be read");
    const auto input = value<BadInput>(meta.input_tensor_meta(0), path_ + ": decode takes no tensor");
    if (input.scalar_type() != executorch::aten::ScalarType::Long || input.sizes().size() != 2)
      throw BadInput(path_ + ": decode does not take token ids (1, 1)");
    if (input.sizes()[0] != 1)
      throw BadInput(path_ + " is a program for batch " + std::to_string(input.sizes()[0]) + ": make one for batch 1");
    if (vocab_size_ > kBytes)
      throw BadInput(path_ + " has a vocabulary of " + std::to_string(vocab_size_) +
                     " tokens: this runner knows bytes alone, and no tokenizer");
  }

  // The last vocab_size numbers of what a method returns: the logits of the last position.
  std::span<const float> run(const char* method, const std::vector<executorch::extension::TensorPtr>& inputs) {
    const auto outputs =
        value(module_.execute(method, std::vector<EValue>(inputs.begin(), inputs.end())), string(method) + " failed");
    if (inputs.empty()) return {};
    if (outputs.size() != 1 || !outputs[0].isTensor()) throw std::runtime_error(string(method) + " returns no tensor");
    const auto& logits = outputs[0].toTensor();
    if (logits.scalar_type() != executorch::aten::ScalarType::Float || logits.numel() != vocab_size_)
      throw std::runtime_error(string(method) + " does not return float32 logits of one token");
    return {logits.const_data_ptr<float>(), size_t(logits.numel())};
  }

  string path_;
  Module module_;
  int64_t max_length_ = 0, vocab_size_ = 0;
};

// ---- the choice of tokens ----

class Sampler {
 public:
  Sampler(double temperature, uint64_t seed) : temperature_(temperature), random_(seed) {}

  int64_t choose(std::span<const float> logits) {
    const auto likeliest = std::max_element(logits.begin(), logits.end());
    if (temperature_ == 0) return likeliest - logits.begin();
    double sum = 0;
    cumulative_.clear();
    for (const float logit : logits) {
      sum += std::exp((double(logit) - *likeliest) / temperature_);
      cumulative_.push_back(sum);
    }
    // Not std::discrete_distribution, which draws otherwise in every standard library.
    const double drawn = double(random_() >> 11) * 0x1p-53 * sum;
    return std::upper_bound(cumulative_.begin(), cumulative_.end() - 1, drawn) - cumulative_.begin();
  }

 private:
  double temperature_;
  std::mt19937_64 random_;
  std::vector<double> cumulative_;
};

// ---- the command ----

struct Options {
  string model;
  std::vector<string> prompts;
  int64_t tokens = 128;
  double temperature = 0;
  uint64_t seed = 0;
  bool help = false;
};

template <typename T>
T integer(const string& name, std::string_view text, T least) {
  T number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < least)
    throw BadInput(name + " is " + string(text) + ": give an integer from " + std::to_string(least));
  return number;
}

double temperature_of(const string& text) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !std::isfinite(number) || number < 0)
    throw BadInput("--temperature is " + text + ": give 0 (greedy) or a positive number");
  return number;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const string name = arguments[i];
    if (name == "--help" || name == "-h") {
      options.help = true;
      return options;
    }
    if (name.empty() || name[0] != '-') {
      if (!options.model.empty()) throw BadInput("one MODEL.pte is run, not " + options.model + " and " + name);
      options.model = name;
      continue;
    }
    if (name != "--prompt" && name != "--tokens" && name != "--temperature" && name != "--seed")
      throw BadInput("there is no option " + name + "; see --help");
    if (++i == count) throw BadInput(name + " needs a value; see --help");
    const string text = arguments[i];
    if (name == "--prompt") {
      if (text.empty()) throw BadInput("the prompt is empty: give at least one character");
      options.prompts.push_back(text);
    } else if (name == "--tokens") {
      options.tokens = integer<int64_t>(name, text, 1);
    } else if (name == "--temperature") {
      options.temperature = temperature_of(text);
    } else {
      options.seed = integer<uint64_t>(name, text, 0);
    }
  }
  if (options.model.empty()) throw BadInput("name a program: runner MODEL.pte --prompt TEXT; see --help");
  if (options.prompts.empty()) throw BadInput("give a text to continue with --prompt");
  return options;
}

// The prompt's bytes as tokens, behind the separator.
std::vector<int64_t> tokens_of(const string& prompt, int64_t vocab_size) {
  std::vector<int64_t> tokens{kSeparator};
  for (const unsigned char byte : prompt) {
    if (byte >= vocab_size)
      throw BadInput("the prompt has a byte " + std::to_string(byte) + ", outside the model's vocabulary of " +
                     std::to_string(vocab_size) + " tokens");
    tokens.push_back(byte);
  }
  return tokens;
}

void write(char byte) {
  // At once, for the reader sees the text as it is made.
  if (std::fputc(static_cast<unsigned char>(byte), stdout) == EOF || std::fflush(stdout) != 0)
    throw std::runtime_error("the text cannot be written");
}

// Seconds that calls took, the writing in between left out.
class Stopwatch {
 public:
  template <typename Call>
  auto operator()(Call&& call) {
    const auto start = std::chrono::steady_clock::now();
    auto result = call();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

  void report(const char* what, size_t tokens) const {
    std::fprintf(stderr, "%s: %zu tokens in %.1f ms, %.0f tokens/s\n", what, tokens, seconds_ * 1e3,
                 double(tokens) / seconds_);
  }

 private:
  double seconds_ = 0;
};

void continue_prompt(LanguageModel& model, std::vector<int64_t> prompt, const Options& options) {
  Sampler sampler(options.temperature, options.seed);
  Stopwatch prefilling, decoding;
  // The state still holds the text before.
  model.reset();
  auto logits = prefilling([&] { return model.prefill(prompt); });
  for (int64_t made = 1;; ++made) {
    const int64_t token = sampler.choose(logits);
    write(char(token));
    if (made == options.tokens) break;
    logits = decoding([&] { return model.decode(token); });
  }
  write('\n');
  prefilling.report("prefill", prompt.size());
  if (options.tokens > 1) decoding.report("decode", size_t(options.tokens - 1));
}

void run(const Options& options) {
  LanguageModel model(options.model);
  std::vector<std::vector<int64_t>> prompts;
  for (const string& prompt : options.prompts) prompts.push_back(tokens_of(prompt, model.vocab_size()));
  for (auto& prompt : prompts) continue_prompt(model, std::move(prompt), options);
}

}  // namespace

int main(int count, char** arguments) {
  executorch::runtime::register_pal(executorch::runtime::PalImpl::create(keep_first_error, __FILE__));
  try {
    const Options options = parse(count, arguments);
    if (options.help) {
      std::fputs(kUsage, stdout);
      return 0;
    }
    run(options);
    return 0;
  } catch (const BadInput& error) {
    std::fprintf(stderr, "runner: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "runner: %s\n", error.what());
    return 1;
  }
}
