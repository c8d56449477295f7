"""What other people's models and loops do: followed, or refused by name before anything is changed."""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.surgery.swap import quantizers
from tests.narrow import present
from tests.nearness import ROUNDING, assert_near
from tests.surgery.nets import Net, TinyNet, with_random_norms

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def ready(model: Net, rules: Any = None) -> Net:
    """Quantized and calibrated, in eval mode."""
    qat.quantize_(model, rules or qat.uniform_rules(4), X)
    qat.calibrate(model, [X])
    return model.eval()


def tiny() -> TinyNet:
    torch.manual_seed(0)
    return ready(with_random_norms(TinyNet()))


def codes_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By hooks on the quantizers: what each was given, quantized by its own formula."""
    seen: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out.detach()))
        for name, quantizer in quantizers(model).items()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------ sums written in place


class Residual(nn.Module):
    """Two layers read the sum, so it has a quantizer."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.gate = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        joined = self.join(self.conv(x), x)
        return (self.last(joined) * self.gate(joined)).mean((2, 3))


def as_statement(out: Tensor, x: Tensor) -> Tensor:
    out.add_(x)
    return out


def as_statement_under_another_name(out: Tensor, x: Tensor) -> Tensor:
    alias = out
    out += x
    return alias


def with_keyword(out: Tensor, x: Tensor) -> Tensor:
    torch.add(out, x, out=(made := torch.empty_like(out)))
    return made


MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expression": lambda out, x: out + x,
    "augmented": lambda out, x: out.__iadd__(x),
    "method": lambda out, x: out.add_(x),
    "statement": as_statement,
    "another name": as_statement_under_another_name,
    "torch.add": lambda out, x: torch.add(out, x),
    "a list's sum": lambda out, x: sum([x], out),
}


@pytest.mark.parametrize("join", MERGES)
def test_a_sum_is_quantized_however_it_is_written(join: str) -> None:
    """All of them compute what the plain expression computes, with the same quantizers."""
    models = []
    for way in ("expression", join):
        torch.manual_seed(0)
        models.append(ready(Residual(MERGES[way])))
        assert "#add0" in quantizers(models[-1])
    first, second = (model(X) for model in models)
    assert torch.equal(first, second)
    gradients = []
    for model in models:
        model.train()
        model(X).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, present(gradients[1][name])), name


def test_operations_whose_names_end_in_a_digit_and_modules_with_odd_names_keep_their_quantizers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            stemmed = self.stem(x)
            return torch.exp2(-stemmed.abs()) + torch.exp2(-x[:, :1])

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("odd#name", Odd())
    model.add_module("head", nn.Conv2d(4, 2, 1))
    ready(model)
    names = {"odd#name#exp2_0", "odd#name#exp2_1"}
    assert names <= quantizers(model).keys()
    model.train()(X).square().sum().backward()
    for name in names:
        assert quantizers(model)[name].raw_scale.grad is not None, name


def test_a_sum_into_a_tensor_of_ones_own_is_quantized() -> None:
    """Autograd has no such form, so in eval mode alone."""
    results = []
    for way in (MERGES["expression"], with_keyword):
        torch.manual_seed(0)
        model = ready(Residual(way))
        with torch.no_grad():
            results.append(model(X))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------ flow


FLOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "property T": lambda x: x.flatten(1).T.T.reshape(x.shape),
    "mT": lambda x: x.mT.mT,
    "data": lambda x: x.data,
    "a cast to bytes and back": lambda x: (x.clamp(0, 1) * 255).to(torch.uint8).float() / 255,
    "a whole write into a buffer": lambda x: torch.zeros_like(x).copy_(x),
    "views": lambda x: x.view(x.shape[0], -1).unflatten(1, x.shape[1:]),
}


class Through(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.way(F.relu(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("way", FLOWS)
def test_the_image_is_followed_through(way: str) -> None:
    table = qat.quantize_(Through(FLOWS[way]), qat.uniform_rules(4), X)
    assert {row.name: (row.kind, str(row.weight)) for row in table.rows}["second"] == ("conv", "s4/axis0")


LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "a list": lambda x: torch.tensor(x.tolist()),
    "torch.tensor": lambda x: torch.tensor(x),
    "item": lambda x: x * x.mean().item(),
    "a decision": lambda x: x if x.sum() > 0 else -x,
    "float()": lambda x: x * float(x.max()),
    "a part written": lambda x: torch.zeros_like(x).index_copy_(1, torch.arange(x.shape[1]), x),
}


@pytest.mark.parametrize("way", LOST)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_what_leaves_pytorch_is_refused_before_anything_is_changed(way: str) -> None:
    model = Through(LOST[way])
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"takes what depends on the image out of PyTorch|writes what depends on the image"
    ):
        qat.quantize_(model, qat.uniform_rules(4), X)
    assert type(model) is Through and type(model.second) is nn.Conv2d and list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------ entry points


class Split(nn.Module):
    """timm's way: features and head are separate methods."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Residual(lambda a, b: a + b), nn.Linear(8, 5)
        self.block.stem, self.block.last, self.block.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return x + 0.5 * x.flip(3)

    def forward_head(self, x: Tensor) -> Tensor:
        pooled = self.block(x)
        return self.head(pooled + pooled.flip(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_other(self, x: Tensor) -> Tensor:
        return x + x.flip(2)


def test_methods_called_alone_have_their_quantizers() -> None:
    torch.manual_seed(0)
    model = ready(Split())
    features = model.forward_features(X)
    assert torch.equal(model.forward_head(features), model(X))
    with pytest.raises(RuntimeError, match="in a method that forward does not use"):
        model.forward_other(X)


def test_a_child_called_alone_has_its_quantizers() -> None:
    torch.manual_seed(0)
    model = ready(Split())
    seen: list[Tensor] = []
    handle = model.block.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    model(X)
    handle.remove()
    given, expected = seen
    assert torch.equal(model.block(given), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_a_checkpointed_block_are_those_without(reentrant: bool) -> None:
    gradients = []
    for use in (False, True):
        torch.manual_seed(0)
        model = ready(Split()).train()
        block = model.block
        if use:
            model.block = Checkpointed(block, reentrant)  # type: ignore[assignment]
        model(X).square().sum().backward()
        gradients.append({name.replace("block.inner.", "block."): p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, present(gradients[1][name])), name


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def kept_for_backward(model: nn.Module) -> int:
    """Bytes that were allocated in a forward pass and not given back by its end."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        out = model(X)
    out.sum().backward()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_keep_less(reentrant: bool) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 3), *(Block() for _ in range(4)))).train()
    plain = kept_for_backward(model)
    for index in range(1, 5):
        model[index] = Checkpointed(model[index], reentrant)
    assert 0 < kept_for_backward(model) < 0.5 * plain


def test_a_checkpointed_function_within_a_module_is_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.c, self.d = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = checkpoint(self.joined, x, use_reentrant=True) if self.training else self.joined(x)
            return self.c(x) * self.d(x)

        def joined(self, x: Tensor) -> Tensor:
            return x + self.b(x)

    model = ready(Inner()).train()
    with pytest.raises(RuntimeError, match="checkpoint a whole module"):
        model(X).sum().backward()


# ------------------------------------------------------------------------------------------ training's own paths


class Noisy(nn.Module):
    """A sum that only training makes, before the residual sum, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)
        self.noise = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training:
            x = x + self.noise * torch.ones_like(x)
        joined = x + self.b(x)
        return self.c(joined) * self.d(joined)


def test_a_sum_of_training_alone_does_not_take_anothers_quantizer() -> None:
    torch.manual_seed(0)
    model = ready(Noisy())
    assert "#add0" in quantizers(model)
    assert torch.equal(model.train()(X), model.eval()(X))  # the noise is 0: the same net


def test_a_number_logged_in_training_hides_no_shift() -> None:
    """What a training pass takes out of PyTorch is not in the file; the pass is traced all the same."""

    class Logged(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen = x.mean().item()
            return super().forward(x)

    torch.manual_seed(0)
    model = ready(Logged())
    assert torch.equal(model.train()(X), model.eval()(X)) and model.seen == pytest.approx(float(X.mean()))


def test_what_is_repeated_otherwise_in_training_is_refused() -> None:
    class Loops(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            for _ in range(2 if self.training else 3):
                x = x + self.b(x)
            return self.c(x)

    with pytest.raises(ValueError, match="one line makes 2 operations of kind add in training and 3 in eval"):
        qat.quantize_(Loops(), qat.uniform_rules(4), X)


def test_sums_skipped_at_random_are_refused_in_the_step_that_skips() -> None:
    class Dropping(Noisy):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            for index in range(3):
                if self.skip and index == 1:
                    continue
                x = x + self.b(x)
            return self.c(x)

    model = ready(Dropping()).train()
    model(X)
    model.skip = True
    with pytest.raises(
        RuntimeError, match=r"made 2 operations of kind \w+ in this training step, 3 when it was quantized"
    ):
        model(X)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, in_eval: bool = True) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.in_eval = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1), in_eval

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.norm(x) if self.in_eval or self.training else x)


def test_a_norm_over_the_batch_is_refused_where_the_model_runs_it() -> None:
    """Each image by itself, as a file answers, and all together: nets with such norms give two answers."""
    torch.manual_seed(0)
    over_batch = Normed(nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert not torch.allclose(over_batch(X)[:1], over_batch(X[:1]), atol=1e-3)
    with pytest.raises(ValueError, match=r"norm: has no running statistics.*track_running_stats=True.*GroupNorm"):
        qat.quantize_(over_batch, qat.uniform_rules(4), X)
    assert not quantizers(over_batch)
    unused = Normed(nn.BatchNorm2d(8, track_running_stats=False), in_eval=False)
    for model in (unused, Normed(nn.BatchNorm2d(8)), Normed(nn.InstanceNorm2d(8))):
        qat.quantize_(model.eval(), qat.uniform_rules(4), X)


def test_fusing_after_quantize_is_refused_with_advice_that_can_be_followed() -> None:
    model = tiny()
    model.left = nn.Conv2d(8, 6, 1)
    with pytest.raises(RuntimeError, match="Fuse, re-parameterise or change a model before quantize_"):
        model(X)


# ------------------------------------------------------------------------------------------ shared weights


def test_a_module_under_two_names_is_one_layer_and_conflicting_rules_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x))).mean((2, 3))

    model = ready(Twice())
    assert model.a is model.b and isinstance(model.a.weight_quantizer, qat.Quantizer)
    with pytest.raises(ValueError, match="a and b are one module, and rules decide them differently"):
        qat.quantize_(Twice(), [("b", qat.FLOAT), *qat.uniform_rules(4)], X)


# ------------------------------------------------------------------------------------------ an ordinary module


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
    "state dict": lambda model: _loaded(model),
}


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def _loaded(model: nn.Module) -> nn.Module:
    other = with_random_norms(TinyNet(), seed=5)
    qat.quantize_(other, qat.uniform_rules(4), X)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same_codes_and_is_independent(way: str) -> None:
    model = tiny()
    other = WAYS[way](model)
    mine, its = codes_of(model, X), codes_of(other, X)
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    before = model(X)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(model(X), before)
    assert isinstance(other, TinyNet)


def test_the_state_dict_holds_tensors_alone_and_safetensors_keeps_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny()
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = with_random_norms(TinyNet(), seed=5)
    qat.quantize_(other, qat.uniform_rules(4), X)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.eval()(X), model(X))


def test_averages_of_weights_work_and_their_copy_is_a_quantized_net(tmp_path: Path) -> None:
    from timm.utils import ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    model = tiny()
    averages = [ModelEmaV2(model, 0.5), ModelEmaV3(model, 0.5), AveragedModel(model)]
    averages[2].update_parameters(model)  # its first update is a copy
    with torch.no_grad():
        model.head.weight.mul_(2)
    for average in averages:
        for update in ("update", "update_parameters"):
            if hasattr(average, update):
                getattr(average, update)(model)
        inner = average.module
        assert isinstance(inner, nn.Module)
        assert not torch.equal(inner.eval()(X), model(X)) and quantizers(inner).keys() == quantizers(model).keys()
    ema = averages[0].module.eval()
    qat.settle_(ema)
    file = qat.export_onnx(ema, tmp_path / "ema.onnx")
    certificate = qat.certify(ema, file, X)
    assert certificate.passed, str(certificate)


def test_threads_share_a_model() -> None:
    model = tiny()
    expected = [model(X[i : i + 1]).detach() for i in range(4)]
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = model(X[index : index + 1])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, value in enumerate(expected):
        assert_near(found[index], value, 64 * ROUNDING)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    model = tiny()
    assert model(X[:0]).shape == (0, 5)
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    model(X[:0]).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_stay_on_the_grid(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    quantizer = model.head.input_quantizer
    seen: list[Tensor] = []
    quantizer.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    out = model(X.to(dtype))
    assert out.dtype == dtype and bool(out.isfinite().all())
    given, made = seen
    assert torch.equal(made, (quantizer.codes(given) * quantizer.scale.to(made.dtype)).to(dtype))


def test_wrapped_and_compiled_models_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="inside OptimizedModule; quantize the model itself"):
        qat.quantize_(torch.compile(TinyNet()), qat.uniform_rules(4), X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inside DataParallel"):
        qat.quantize_(nn.DataParallel(TinyNet()), qat.uniform_rules(4), X)
    with pytest.raises(ValueError, match="quantized already"):
        qat.quantize_(tiny(), qat.uniform_rules(4), X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:FutureWarning")
def test_tracers_say_why_not() -> None:
    model = tiny()
    with pytest.raises(TypeError, match=r"symbolic_trace cannot see the quantizers.*torch\.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match=r"jit\.trace cannot record"):
        torch.jit.trace(model, X)


def test_data_parallel_on_one_place_is_the_model() -> None:
    model = tiny()
    assert torch.equal(nn.DataParallel(model)(X), model(X))


def test_old_checkpoints_names_of_repeated_relus_stay() -> None:
    """torchvision's blocks use one ReLU module twice; each place has its address, as before."""
    from torchvision.models.resnet import BasicBlock

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))

    table = qat.quantize_(Net(), qat.uniform_rules(4), X)
    assert "blocks.0.relu#clip1" in table.points and "blocks.0.relu#clip0" not in table.points


def test_explanations_name_bits_rule_and_readers() -> None:
    model = with_random_norms(TinyNet())
    table = qat.quantize_(model, [("head", qat.FLOAT), *qat.uniform_rules(4)], X)
    assert "by rule '*'" in table.explain("stem") and "4-bit" not in table.explain("head")
    assert "in floating point by rule 'head'" in table.explain("head")
    assert "block#add0: add of" in table.explain("block#add0") and "Read by" in table.explain("block#add0")
    with pytest.raises(ValueError, match="nothing: is not a layer"):
        table.explain("nothing")
