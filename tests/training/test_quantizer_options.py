"""Options of the quantizers and repairs, from the recipe through training to a certified file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch

from qat.deploy import certify_run, export_run
from qat.domains.synthetic import synthetic_domains
from qat.quantizers.lsq_plus import LSQPlus
from qat.runs.build import load_run, rules_of
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, from_json, recipe_of, to_json
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder
from qat.surgery.swap import quantizers
from qat.train.loop import run
from tests.narrow import present

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 4, "evaluate_every": 2, "workers": 0,
    "calibration_batches": 2,
}  # fmt: skip
RULES = '[[rules]]\nlayers = "layer*conv1"\nweight_bits = 3\ninput_bits = 5\noffset = true\n'


def trained(path: Path, **options: Any) -> Path:
    run(recipe_of("lsq", **(TINY | options), out=path), DOMAINS)
    return path


def certified(path: Path) -> None:
    certificate = certify_run(path, export_run(path))
    assert certificate.passed and certificate.mismatches == 0, str(certificate)


@pytest.mark.slow
def test_lsq_plus_with_rules_and_norms_that_stay_is_certified(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    path = trained(
        tmp_path / "run", activations="lsq-plus", rules=rules, gradient_count="numel", norms="frozen-statistics"
    )
    rules.unlink()  # the run folder is complete without it
    model = load_run(path)[2].model
    found = quantizers(model)
    three = {name for name, q in found.items() if q.is_weight and q.spec.bits == 3}
    assert three and all(name.endswith("conv1.weight") for name in three)
    inputs = [q for name, q in found.items() if name.endswith(".input")]
    assert inputs and all(isinstance(q, LSQPlus) for q in inputs)
    assert all(q.spec.gradient_count == "numel" for q in found.values())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(bool((m.num_batches_tracked == 0).all()) and bool((m.running_mean == 0).all()) for m in norms)
    certified(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_power_of_two_scales_after_gptq_with_statistics_taken_again_are_certified(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", power_of_two=True, init="gptq", norm_batches=2)
    model, results = load_run(path)[2].model, RunFolder.open(path).results()
    scales = np.concatenate([q.scale.numpy().ravel() for q in quantizers(model).values()])
    assert np.array_equal(np.log2(scales), np.rint(np.log2(scales)))
    assert "taken again from 2 batches" in results["selection"]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {int(present(m.num_batches_tracked)) for m in norms} == {2}
    certified(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_folded_equalized_nets_are_certified(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", fold_norms=True, init="cle")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in load_run(path)[2].model.modules())
    certified(path)


@pytest.mark.filterwarnings("ignore")
def test_activations_alone_train_and_go_to_qonnx(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", activation_only=True, init="bias-correction")
    assert not any(q.is_weight for q in quantizers(load_run(path)[2].model).values())
    with pytest.raises(ValueError, match="activation-only"):
        export_run(path)
    file = onnx.load(str(export_run(path, "qonnx")))
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("Quant") == len(quantizers(load_run(path)[2].model))


@pytest.mark.parametrize(("options", "message"), [
    ({"weight_only": True, "activation_only": True}, "--weight-only and --activation-only"),
    ({"activations": "lsq-plus", "power_of_two": True}, "--power-of-two"),
    ({"init": "gptq", "activation_only": True}, "--init gptq"),
    ({"norm_batches": -1}, "--norm-batches"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe_of("lsq", **options))


def test_repairs_come_before_training_and_options_survive_the_recipe_file() -> None:
    with pytest.raises(RecipeError, match="--init gptq"):
        check(recipe_of("qtdog", init="gptq"))
    recipe = recipe_of("lsq", init="cle", rules=Path("a.toml"), norms="frozen", activations="lsq-plus")
    assert from_json(to_json(recipe), Path("recipe.json")) == recipe
    assert recipe.changed(init="lsq").quantization.scale_init == "lsq"
    assert recipe.quantization.scale_init == "mse"


def test_functions_of_linears_are_tables_where_a_run_asks() -> None:
    recipe = recipe_of("lsq")
    older = {key: value for key, value in to_json(recipe).items() if key != "tables"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1, img_size=32)
    assert all(spec.table for _, spec in rules_of(recipe.changed(tables=True), model))
    assert not any(spec.table for _, spec in rules_of(from_json(older, Path("recipe.json")), model))
    assert not any(spec.table for _, spec in rules_of(recipe, model))


def test_eight_bit_weights_are_symmetric_but_in_runs_of_before() -> None:
    recipe = recipe_of("lsq", bits=4, edge_bits=8)
    older = {key: value for key, value in to_json(recipe).items() if key != "symmetric_weights"}
    model = timm.create_model("resnet18", num_classes=2)

    def lowest_codes(given: Recipe) -> set[int]:
        return {spec.weight.qmin for _, spec in rules_of(given, model) if spec.weight is not None}

    assert lowest_codes(recipe) == {-127, -8}
    assert lowest_codes(from_json(older, Path("recipe.json"))) == {-128, -8}
