"""The kernels for another processor: the CMake project builds for ARM, and the cores compute the same there."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mq_ao.ops.native import build
from mq_ao.ops.native.shared_library import CORE_FLAGS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CORES = Path(build.__file__).parent
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"needs {COMPILER} (Debian: apt install g++-aarch64-linux-gnu)"
)

# Prints the results of a float and an int8 scan and of both convolutions, over operands from a generator of its own.
PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "qconv.h"
#include "tasks.h"
using namespace mq_ao;

constexpr int64_t kBatch = 2, kLength = 37, kChannels = 21, kStates = 16, kTaps = 4;
uint32_t seed = 1;
float uniform() { return float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-24f; }
std::vector<float> floats(int64_t count, float low, float high) {
  std::vector<float> v(count);
  for (float& x : v) x = low + (high - low) * uniform();
  return v;
}
std::vector<int8_t> bytes(int64_t count) {
  std::vector<int8_t> v(count);
  for (int8_t& x : v) x = int8_t(int(uniform() * 255.0f) - 127);
  return v;
}
template <typename T> Rows<T> rows(T* p, int64_t width) { return {p, kLength * width, width, 0}; }
template <typename T> void print(const std::vector<T>& v) { for (T x : v) std::printf("%.9g\n", double(x)); }
const auto alone = [](int64_t count, int64_t, auto&& part) { part(0, count); };

int main() {
  const int64_t n = kBatch * kLength * kChannels;
  const auto u = floats(n, -2, 2), delta = floats(n, -3, 1), A = floats(kChannels * kStates, -4, 0);
  const auto B = floats(kBatch * kLength * kStates, -1, 1), C = floats(kBatch * kLength * kStates, -1, 1);
  const auto D = floats(kChannels, -1, 1), bias = floats(kChannels, -1, 1);
  const ScanShape shape{kBatch, kLength, kChannels, 1, kStates};
  std::vector<float> y(n), last(kBatch * kChannels * kStates);
  const float* none = nullptr;
  run_scan(ScanInputs<float>{shape, rows(u.data(), kChannels), rows(delta.data(), kChannels), rows(B.data(), kStates),
                             rows(C.data(), kStates), A.data(), D.data(), bias.data(), none, true},
           rows(y.data(), kChannels), last.data(), alone);
  print(y), print(last);

  const auto q = bytes(n);
  const QRows integers{q.data(), kLength * kChannels, kChannels, true, Grid(true, 0.02, 5)};
  const QRows steps{delta.data(), kLength * kChannels, kChannels, false, Grid()};
  std::vector<int8_t> qy(n);
  const QOutput out(qy.data(), kLength * kChannels, kChannels, true, 0.05, -3);
  run_scan(ScanOperands<QRows, float, QStates<const void>>{
               shape, integers, steps, rows(B.data(), kStates), rows(C.data(), kStates), A.data(), D.data(),
               bias.data(), {nullptr, nullptr}, true},
           out, QStates<void>{last.data(), nullptr}, alone);
  print(qy), print(last);

  const auto weight = floats(kChannels * kTaps, -1, 1), scale = floats(kChannels, 0.001f, 0.01f);
  const auto qweight = bytes(kChannels * kTaps);
  const ConvShape conv{kBatch, kLength, kChannels, kTaps};
  std::vector<float> history(kBatch * (kTaps - 1) * kChannels);
  const ConvInputs<float> in{conv, rows(u.data(), kChannels), weight.data(), bias.data(), nullptr, true};
  const QConvInputs qin{conv, rows(reinterpret_cast<const uint8_t*>(q.data()), kChannels), Grid(true, 0.02, 5),
                        qweight.data(), scale.data(), bias.data(), nullptr, true};
  for_channel_ranges(kBatch, kLength, kChannels, alone, [&](const ChannelTask& task) {
    conv_task(in, task, rows(y.data(), kChannels), history.data());
  });
  print(y), print(history);
  for_channel_ranges(kBatch, kLength, kChannels, alone, [&](const ChannelTask& task) {
    qconv_task(qin, task, out, history.data());
  });
  print(qy), print(history);
}
"""


def compiled(compiler: str, folder: Path) -> Path:
    source, program = folder / "program.cpp", folder / Path(compiler).name
    source.write_text(PROGRAM)
    # GCC 12's own AVX-512 header has values that it takes for uninitialized; psabi is a note for C callers of vectors.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    command = [compiler, *CORE_FLAGS, *warnings, "-static", f"-I{CORES}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def results(*command: str) -> torch.Tensor:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return torch.tensor([float(line) for line in done.stdout.split()])


@needs_compiler
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR} (Debian: apt install qemu-user)")
@pytest.mark.usefixtures("native_kernels")
def test_cores_on_arm_compute_what_they_compute_here(tmp_path: Path) -> None:
    here = results(str(compiled(build.compiler(), tmp_path)))
    there = results(EMULATOR, str(compiled(COMPILER, tmp_path)))
    assert here.shape == there.shape and here.isfinite().all() and here.unique().numel() > 1000
    # Other vector widths add in another order. Integers could differ by a step where that crosses a boundary; with
    # these operands none does.
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake (Debian: apt install cmake)")
def test_static_library_builds_for_arm(tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime", reason='needs executorch: pip install "mq-ao[executorch]"')
    spec = importlib.util.find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    package = Path(next(iter(spec.submodule_search_locations))) / "share" / "cmake"
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    configure = ["cmake", "-S", str(CORES / "executorch"), "-B", str(tmp_path), f"-Dexecutorch_DIR={package}", *target]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    archive = tmp_path / "libmq_ao_executorch.a"
    assert not (tmp_path / "libmq_ao_executorch.so").exists()
    names = subprocess.run(["aarch64-linux-gnu-nm", str(archive)], check=True, capture_output=True, text=True).stdout
    # The operators enter themselves, with the app's registry and threads.
    entering = [path for path in (CORES / "executorch").glob("*.cpp") if "enter<" in path.read_text()]
    assert names.count("U _ZN10executorch7runtime16register_kernels") == len(entering) >= 6
    assert "U _ZN10executorch9extension12parallel_forE" in names
    assert "T mq_ao_share_packed_weights" in names
