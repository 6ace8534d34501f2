# SPDX-License-Identifier: Apache-2.0
"""Every operator as PyTorch sees it: values and gradients, registration, compilation, TorchScript, export,
errors. All tests run over the one list in samples.py."""

import io
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from samples import REFUSALS, SAMPLES

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
first_samples = list({s.op: s for s in reversed(SAMPLES)}.values())
every_differentiable_op = pytest.mark.parametrize(
    "sample", [s for s in first_samples if s.differentiable and not s.derived_by_torch], ids=lambda s: s.op
)
every_inference_op = pytest.mark.parametrize(
    "sample", [s for s in first_samples if not s.differentiable], ids=lambda s: s.op
)


def strided(t):
    """The same values behind the strides of a slice of a wider tensor."""
    if t.dim() == 0:
        return t
    wide = t.new_zeros(*t.shape[:-1], 2 * t.size(-1) + 3)
    view = wide[..., 1 : 1 + 2 * t.size(-1) : 2].copy_(t.detach())
    return view.requires_grad_(t.requires_grad)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def tensors_of(inputs):
    """Lists of tensors are taken apart."""
    return [v for v in tree_leaves(inputs) if isinstance(v, torch.Tensor)]


def split(inputs):
    """The tensors and lists of tensors, and all that is neither."""
    tensors = {k: v for k, v in inputs.items() if tensors_of(v)}
    return tensors, {k: v for k, v in inputs.items() if k not in tensors}


def forward_and_backward(function, inputs, weigh=lambda t: t):
    """All outputs, then the gradients (if any) of a weighted sum of the differentiable ones. The weights are always the
    same, and exact in any dtype."""
    outputs = as_tuple(function(**inputs))
    leaves = [v for v in tensors_of(inputs) if v.requires_grad]
    if not leaves:
        return list(outputs)
    roots = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [weigh(torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)) for y in roots]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(roots, leaves, weights))


def assert_close(got, want, tolerance):
    """Each |got - want| <= tolerance * max |want|, tensor by tensor."""
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want)):
        assert g.shape == w.shape, f"tensor {i}"
        bound = tolerance * w.double().abs().max().item() if w.numel() else 0
        torch.testing.assert_close(
            g.double(), w.double(), rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"tensor {i}: {m}"
        )


def assert_equal(got, want):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want)):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"tensor {i}: {m}")


# ---- values and gradients ----


@every_sample
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_equals_reference(sample, dtype, layout):
    """Outputs and all gradients; those through a quantizer are the reference's straight-through ones."""
    inputs = sample.inputs(dtype)
    # bfloat16 is computed in float32 and rounded once, so the reference is too.
    exact = tree_map_only(
        torch.Tensor,
        lambda t: t.detach().float().requires_grad_(t.requires_grad) if t.dtype == torch.bfloat16 else t,
        inputs,
    )
    want = forward_and_backward(sample.reference, exact)
    if layout == "strided":
        tensors, options = split(inputs)
        inputs = tree_map(strided, tensors) | options
        got = forward_and_backward(sample.function, inputs, weigh=strided)
    else:
        got = forward_and_backward(sample.function, inputs)
    # Where operands are rounded by request, by no more than this.
    by_request = {inputs.get("gradient"), inputs.get("precision")} - {None, "float32"}
    rounded = bool(by_request) and dtype != torch.float64
    assert_close(got, want, 2e-2 if rounded else TOLERANCE[dtype])
    assert got[0].dtype == sample.output_dtype(dtype) and got[0].is_contiguous()
    for g, name in zip(reversed(got), reversed([k for k in inputs if k in sample.differentiable])):
        assert g.dtype == dtype, f"gradient of {name}"


@every_sample
def test_gradients_by_finite_differences(sample):
    if not sample.smooth:
        return  # test_equals_reference compares the straight-through gradients
    inputs = sample.inputs(torch.float64, requires_grad=False)
    leaves, structure = tree_flatten({name: inputs[name] for name in sample.smooth})
    leaves = [t.requires_grad_() for t in leaves]

    def function(*values):
        return sample.function(**inputs | tree_unflatten(values, structure))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=sum(t.numel() for t in leaves) > 500)


@every_inference_op
def test_backward_of_inference_is_refused(sample):
    inputs = sample.inputs(torch.float32)
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    outputs = [y for y in as_tuple(sample.function(**inputs)) if y.is_floating_point()]
    if not outputs:
        return  # integers have no derivative
    y = outputs[-1]
    with pytest.raises(RuntimeError, match=f"derivative for flashlm::{sample.op} is not implemented"):
        y.sum().backward()


@every_differentiable_op
def test_double_backward_is_refused(sample):
    inputs = sample.inputs(torch.float32)
    y = as_tuple(sample.function(**inputs))[0]
    leaf = inputs[sample.differentiable[0]]
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for flashlm::_\w+ is not implemented"):
        grad.sum().backward()


# ---- registration ----


class PrivateCalls(TorchDispatchMode):
    """Collects every call of an operator flashlm::_x, which is how a backward pass is made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flashlm" and function._opname.startswith("_"):
            assert not kwargs, "the dispatcher passes what is not a default by position"
            self.calls.append((function, [v.clone() if isinstance(v, torch.Tensor) else v for v in args]))
        return function(*args, **kwargs or {})


@every_sample
def test_opcheck(sample):
    """The operator and the private ones of its backward pass keep PyTorch's rules."""
    torch.library.opcheck(sample.function, (), sample.inputs(torch.float32))
    with PrivateCalls() as private:
        forward_and_backward(sample.function, sample.inputs(torch.float32))
    assert private.calls or sample.derived_by_torch or not sample.differentiable, "the backward pass is not an operator"
    for function, args in private.calls:
        torch.library.opcheck(function, tuple(args))


def test_every_operator_has_samples():
    names = [name.split(".")[0].split("::") for name in torch._C._dispatch_get_all_op_names()]
    public = {op for namespace, op in names if namespace == "flashlm" and not op.startswith("_")}
    assert public == {s.op for s in SAMPLES}
    assert public == {r.op for r in REFUSALS}


# ---- compilation ----


@every_sample
def test_compile(sample):
    """No graph break, dynamic shapes, forward and backward: the same bits as eager."""
    torch._dynamo.reset()
    tensors, options = split(sample.inputs(torch.float32))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**arguments):
        return sample.function(**arguments, **options)

    assert_equal(
        forward_and_backward(compiled, tensors),
        forward_and_backward(lambda **arguments: sample.function(**arguments, **options), tensors),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_inductor():
    """Generated code around an operator, and a second length without a new compilation."""
    torch._dynamo.reset()

    def function(x, scale):
        return torch.ops.flashlm.rms_norm(x.sin(), scale).exp() + x

    # Scalar code: vectors would cost a trial compilation of each instruction set.
    compiled = torch.compile(function, fullgraph=True, dynamic=True, options={"cpp.simdlen": 1})
    for rows in (5, 9):
        inputs = dict(x=torch.randn(rows, 16, requires_grad=True), scale=torch.randn(16, requires_grad=True))
        with torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"):
            got = forward_and_backward(compiled, inputs)
        assert_close(got, forward_and_backward(function, inputs), 1e-5)


def annotation(value):
    return "Tensor" if isinstance(value, torch.Tensor) else "List[Tensor]"


@every_sample
def test_torchscript(sample):
    """A scripted function that calls the operator, before and after a round trip through a file."""
    tensors, options = split(sample.inputs(torch.float32))
    arguments = [f"{k}={k}" for k in tensors] + [f"{k}={v!r}" for k, v in options.items()]
    source = (
        f"def function({', '.join(f'{k}: {annotation(v)}' for k, v in tensors.items())}):\n"
        f"    return torch.ops.flashlm.{sample.op}({', '.join(arguments)})\n"
    )
    scripted = torch.jit.CompilationUnit(source).function
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    want = forward_and_backward(sample.function, tensors | options)
    for _ in range(3):  # the first calls profile, the later ones run what the profile was turned into
        assert_equal(forward_and_backward(scripted, tensors), want)
        assert_equal(forward_and_backward(loaded, tensors), want)


class Call(torch.nn.Module):
    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, **tensors):
        return self.function(**tensors, **self.options)


@every_sample
def test_export(sample):
    """The operator is one node of the exported graph, and made of our private ones after decomposition, or of torch's."""
    tensors, options = split(sample.inputs(torch.float32, requires_grad=False))
    exported = torch.export.export(Call(sample.function, options), (), tensors)
    assert [node.target for node in exported.graph.nodes].count(sample.function) == 1
    core = exported.run_decompositions()
    assert sample.derived_by_torch or any(getattr(n.target, "namespace", "") == "flashlm" for n in core.graph.nodes)
    for program in (exported, core):
        assert_equal(as_tuple(program.module()(**tensors)), as_tuple(sample.function(**tensors, **options)))


# ---- errors ----


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_wrong_arguments_are_refused(refusal):
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.flashlm, refusal.op)(**refusal.inputs())
    assert f"{refusal.op}: {refusal.words}" in str(error.value)
