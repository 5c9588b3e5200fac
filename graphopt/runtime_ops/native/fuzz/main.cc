// Feeds every operator of the library with nodes at random, mostly broken ones: each must end with a result or with an
// error that names the node. Built with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#include <csignal>
#include <unistd.h>

#include "fuzz/fake_runtime.h"
#include "isa.h"

namespace {

using namespace graphopt;
using namespace graphopt::fuzz;

constexpr uint8_t kBlank[2] = {0x2a, 0x7f};  // what outputs hold before two runs of one node
constexpr unsigned kSeconds = 30;  // a node that takes longer hangs

std::string current;  // what is being tried

void tell() {
  std::fputs(current.c_str(), stderr);
  std::fputs("\n", stderr);
}

[[noreturn]] void wrong(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  tell();
  std::_Exit(1);
}

struct Count {
  int64_t good = 0, refused = 0;
};

// An error must say which node it is about.
bool good(const Outcome& outcome, const Case& made, Count& count) {
  if (outcome.ok) {
    ++count.good;
    return true;
  }
  ++count.refused;
  const std::string start = std::string(made.op->GetName(made.op)) + " 'fuzzed': ";
  if (outcome.error.compare(0, start.size(), start) != 0 || outcome.error.size() == start.size()) {
    wrong("an error that doesn't name the node, or says nothing: " + outcome.error);
  }
  return false;
}

Case random_node(const abi::CustomOp& op, Random& random) {
  Case made(op, random);
  for (size_t i = 0; i < op.GetInputTypeCount(&op); ++i) {
    Shape shape(size_t(random.below(5)));
    for (int64_t& dim : shape) dim = random.chance(50) ? int64_t(1) << random.below(5) : random.below(9);
    made.input(shape);
  }
  return made;
}

// What an output lies in is no constant of a model.
void choose_constants(Case& made, Random& random) {
  for (size_t i = 0; i < made.inputs.size(); ++i) made.constant[i] = made.inputs[i] && random.chance(30);
  for (const Output& output : made.outputs) {
    if (output.shares >= 0) made.constant[size_t(output.shares)] = false;
  }
}

void same(const std::vector<std::vector<std::byte>>& first, const std::vector<std::vector<std::byte>>& second) {
  for (size_t output = 0; output < first.size(); ++output) {
    for (size_t i = 0; i < first[output].size(); ++i) {
      if (first[output][i] == second[output][i]) continue;
      const int one = int(first[output][i]), other = int(second[output][i]);
      const bool blank = one == kBlank[0] && other == kBlank[1];
      wrong("two runs of a valid node differ: byte " + std::to_string(i) + " of output " + std::to_string(output) +
            (blank ? " isn't written" : " is " + std::to_string(one) + ", then " + std::to_string(other)));
    }
  }
}

// A valid node gives the same with any number of threads and whatever was in the outputs' memory before.
void valid(const abi::CustomOp& op, void (*make)(Random&, Case&), Random& random, Count& count) {
  Case made(op, random);
  make(random, made);
  current += "valid " + made.text();
  choose_constants(made, random);
  infer(made, random);
  FakeKernel kernel(made, false, random);
  if (!good(kernel.made(), made, count)) wrong("a valid node was refused: " + kernel.made().error);
  std::vector<std::vector<std::byte>> first;
  for (bool threads : {false, true}) {
    Case again = made;
    // Constants stay where the kernel saw them.
    for (size_t i = 0; i < made.inputs.size(); ++i) {
      if (made.constant[i]) std::swap(again.inputs[i], made.inputs[i]);
    }
    again.threads = threads;
    const Outcome ended = kernel.run(again, kBlank[threads]);
    for (size_t i = 0; i < made.inputs.size(); ++i) {
      if (made.constant[i]) std::swap(again.inputs[i], made.inputs[i]);
    }
    if (!good(ended, made, count)) wrong("a valid node was refused: " + ended.error);
    if (threads) same(first, kernel.outputs());
    first = kernel.outputs();
  }
}

void broken(const abi::CustomOp& op, void (*make)(Random&, Case&), Random& random, Count& count) {
  Case made = make ? Case(op, random) : random_node(op, random);
  if (make) {
    make(random, made);
    mutate(made, random);
  }
  choose_constants(made, random);
  made.threads = random.chance(5);
  const std::string start = current;
  current += made.text();
  infer(made, random);
  FakeKernel kernel(made, make == nullptr, random);
  if (!good(kernel.made(), made, count)) return;
  for (int run = 0; run < 3; ++run) {
    current = start + made.text() + ", run " + std::to_string(run);
    good(kernel.run(made, 0x5a), made, count);
    mutate_inputs(made, random);
  }
}

}  // namespace

// UndefinedBehaviorSanitizer calls this when it found something.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report() { tell(); }

int main(int argc, char** argv) {
  int64_t cases = 5000, seed = 0;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--cases") == 0) cases = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--operator") == 0) only = argv[i + 1];
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(tell);
#endif
  std::signal(SIGALRM, [](int) { wrong("a node takes too long"); });
  const auto& operators = registered_operators();
  for (size_t variant = 0; variant < operators.size(); ++variant) {
    const abi::CustomOp& op = *operators[variant];
    const std::string name = op.GetName(&op);
    if (!only.empty() && name != only) continue;
    const auto make = maker(name);
    Count count;
    for (int64_t i = seed; i < seed + cases; ++i) {
      Random random(uint64_t(i) * 1000 + variant);
      const char* isa = limit_isa(i % 3 == 0 ? "generic" : i % 3 == 1 ? "avx2" : "");
      current = "--operator " + name + " --cases 1 --seed " + std::to_string(i) + " (" + isa + "): ";
      alarm(kSeconds);
      if (make && i % 8 == 0) {
        valid(op, make, random, count);
      } else {
        broken(op, make, random, count);
      }
    }
    std::printf("%s, inputs", name.c_str());
    for (size_t i = 0; i < op.GetInputTypeCount(&op); ++i) std::printf(" %d", int(op.GetInputType(&op, i)));
    std::printf(": %lld calls went well, %lld were refused%s\n", (long long)count.good, (long long)count.refused,
                make ? "" : "; no fuzz.cc says what a valid node is");
  }
  return 0;
}
