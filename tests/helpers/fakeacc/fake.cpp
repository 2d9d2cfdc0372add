// A fake accelerator for tests: torch's spare device type over host memory, computed by the CPU's kernels.
//
// What it is for: every byte on it is counted, and an operation that mixes it with the host raises, as on a real one.
// Streams, events and pinned memory do nothing.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

namespace {

const c10::Device device(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

// Memory

std::atomic<int64_t> live{0};
std::atomic<int64_t> peak{0};
std::atomic<int64_t> limit{int64_t(1) << 40};

struct Block {
  explicit Block(size_t size) : bytes(static_cast<int64_t>(size)), data(new char[size]) {
    int64_t now = live += bytes;
    if (now > limit) {
      live -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "fake out of memory. Tried to allocate ", bytes, " bytes");
    }
    int64_t most = peak;
    while (now > most && !peak.compare_exchange_weak(most, now)) {}
  }
  ~Block() { live -= bytes; }
  int64_t bytes;
  std::unique_ptr<char[]> data;
};

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    auto* block = new Block(size);
    return {block->data.get(), block, [](void* context) { delete static_cast<Block*>(context); }, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

// The device and its one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = allocator.allocate(size);
    if (storage.nbytes() > 0) std::memcpy(data.mutable_get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// Operations

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<at::Device>;
using Pinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

at::Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Place, Pinned, Format format) {
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Place, Pinned) {
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the host.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  const auto& storage = tensor.storage();
  const auto elements = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto whole = at::from_blob(const_cast<void*>(storage.data()), {elements}, [tensor](void*) {}, options);
  return whole.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return on_host(tensor).item(); }

at::Tensor as_strided(
    const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

at::Tensor view(const at::Tensor& tensor, at::IntArrayRef size) { return at::native::view(tensor, size); }

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(tensor, size, stride);
}

at::Tensor unfold(const at::Tensor& tensor, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dim, size, step);
}

at::Tensor view_as_real(const at::Tensor& tensor) { return at::native::view_as_real(tensor); }

at::Tensor view_as_complex(const at::Tensor& tensor) { return at::native::view_as_complex(tensor); }

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, Format format) {
  return at::native::resize_(tensor, size, format);
}

// As on a GPU, a single number may be on the host.
void check(const at::Tensor& tensor, const std::string& operation) {
  TORCH_CHECK(
      !tensor.defined() || tensor.dim() == 0 || !tensor.device().is_cpu(),
      "Expected all tensors to be on the same device, but ", operation, " got one on cpu and one on fake:0");
}

at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups) {
  std::optional<at::Tensor> shift;
  if (bias.has_value() && bias->defined()) shift = *bias;
  for (const auto& tensor : {x, weight, shift.value_or(at::Tensor())}) check(tensor, "convolution");
  if (shift) shift = on_host(*shift);
  return at::convolution(on_host(x), on_host(weight), shift, stride, padding, dilation, transposed, more, groups)
      .to(device);
}

// Everything else: see that all tensors are here, let the CPU compute it, bring back the result.
void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const bool by_index = name.rfind("aten::index.", 0) == 0 || name == "aten::index" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_";  // a GPU takes indices from the host
  if (!by_index) {
    for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (argument.isTensor()) check(argument.toTensor(), name);
      if (!argument.isTensorList()) continue;
      for (const auto& tensor : argument.toTensorVector()) check(tensor, name);
    }
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("view_as_real", view_as_real);
  library.impl("view_as_complex", view_as_complex);
  library.impl("resize_", resize);
  library.impl("convolution_overrideable", convolution);
  // torch would compose these of others, and round otherwise than the CPU does
  for (const auto* name : {"native_layer_norm", "native_group_norm", "scaled_dot_product_attention"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
  }
}

TORCH_LIBRARY(fakeacc, library) {
  library.def("live_bytes() -> int", []() -> int64_t { return live; });
  library.def("peak_bytes() -> int", []() -> int64_t { return peak; });
  library.def("limit() -> int", []() -> int64_t { return limit; });
  library.def("set_limit(int bytes) -> ()", [](int64_t bytes) { limit = bytes; });
  library.def("reset_peak() -> ()", []() { peak = live.load(); });
}
