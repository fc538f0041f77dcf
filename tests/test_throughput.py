"""Tests of benchmarks/throughput.py and of vitral.bench, on a CPU."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vitral import settings
from vitral.bench import contest, memory, rounds
from vitral.bench.contest import Training
from vitral.bench.describe import describe_device
from vitral.bench.model import NO_TIMM, table
from vitral.bench.peers import PEERS
from vitral.bench.profile import Entry, kind_of, summarize
from vitral.cli import main
from vitral.config import Config, ViTConfig
from vitral.errors import UserError
from vitral.model import ViT, count_flops, forward_flops
from vitral.training import parallel
from vitral.training.resolved import Resolved

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "throughput.py"
TINY = "--device cpu --threads 1 --rounds 2 --seconds 0.001 --recipe digits --batch 2".split()
HAS_TIMM = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(rounds, "SECONDS", 0.001)
    monkeypatch.setattr(contest, "MATMULS", {"cpu": (64,)})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def throughput():
    spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_timm
def test_the_complete_command(throughput, tmp_path, capsys):
    file = tmp_path / "rates.json"
    assert throughput.main([*TINY, "--mode", "both", "--json", str(file)]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert set(found["environment"]) >= {"date", "command", "commit", "processor", "packages"}
    assert found["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert [case["mode"] for case in found["cases"]] == ["train", "infer"]
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["contestants"]}
        assert list(rows) == ["vitral", *PEERS]
        for name, row in rows.items():
            consistent(row, rows["timm"], case)
            assert any(line.startswith(f"{name} ") for line in out.splitlines())
    train, infer = (case["contestants"][0] for case in found["cases"])
    assert train["gflops_per_image"] == pytest.approx(3 * infer["gflops_per_image"])


def consistent(row, timm, case):
    """Checks that derived values follow from the times of the rounds."""
    assert len(row["ms"]) == len(row["processor_ms"]) == case["rounds"] == 2
    assert row["images_per_second"]["rounds"] == pytest.approx([2000 / ms for ms in row["ms"]])
    ratios = [a / b for a, b in zip(timm["processor_ms"], row["processor_ms"], strict=True)]
    assert row["ratio"]["rounds"] == pytest.approx(ratios)
    assert row["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    assert row["ratio"]["min"] == min(ratios)
    assert row["ratio"]["max"] == max(ratios)
    flops = 2 * row["gflops_per_image"] * 1e9
    assert row["tflops"] * 1e12 == pytest.approx(flops / (sum(row["ms"]) / 2e3))
    assert row["share_of_matmul"] == pytest.approx(row["tflops"] / case["matmul_tflops"])
    assert row["memory_bytes"] is row["compile_s"] is None
    assert row["compilations"] == 0


@needs_timm
def test_a_profile_contains_all_kinds_of_kernels(throughput, tmp_path, capsys):
    file = tmp_path / "profile.json"
    assert throughput.main([*TINY, "--profile", "timm", "--json", str(file)]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert sum(case["shares"].values()) == pytest.approx(1)
    assert min(case["shares"][kind] for kind in ("matmul", "attention", "optimizer")) > 0
    assert len(case["top"]) == 15
    assert " aten::addmm" in capsys.readouterr().out


@pytest.mark.parametrize(("fused", "kernels"), [(True, ", fused kernels"), (False, "")])
def test_the_table_names_the_kernels_used(fused, kernels):
    """vitral uses torch's kernels if they are faster."""
    choices = {"processes": 1, "decoder": "cpu", "micro_batch": 2, "fused": fused}
    resolved = Resolved("cuda", "bf16", compile=True, threads=4, **choices)
    assert describe_device(resolved) == f"cuda, bf16, compiled{kernels}, 4 threads"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # from torch 2.11 itself
def test_each_model_is_compiled_once(monkeypatch):
    """With Dynamo, and a backend that takes seconds instead of minutes."""

    def compiled(model, resolved):
        assert resolved.compile
        return torch.compile(model, backend="aot_eager", dynamic=False)

    def deeper(config, num_classes):
        return ViT(dataclasses.replace(config, depth=2), num_classes)

    monkeypatch.setattr(parallel, "compiled", compiled)
    config = settings.load("digits", "--train.batch-size 2 --train.compile always".split())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=1))
    case = contest.compare(config, "train", {"one": ViT, "two": deeper}, 3)
    assert [row["compilations"] for row in case["contestants"]] == [1, 1]
    assert all(row["compile_s"] > 0 for row in case["contestants"])
    assert case["contestants"][0]["ratio"] is None
    assert table(case).count(" s, 1 graphs") == 2


HIDE = """
import sys
from importlib.machinery import PathFinder

class WithoutTimm(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "timm" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTimm
"""


def test_without_timm_only_vitral_is_measured(tmp_path):
    """In an interpreter that cannot find timm."""
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(HIDE)
    command = [sys.executable, str(SCRIPT), *TINY]
    paths = [str(tmp_path), str(SCRIPT.parents[1] / "src")]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(NO_TIMM + "\n")
    assert "\nvitral " in done.stdout
    assert "\ntimm" not in done.stdout


def test_every_size_and_batch_is_a_case(throughput):
    options = throughput.parse("--sizes s l/14 --batch 2 4 --image-size 112 --threads 3".split())
    found = [(c.model, c.train.batch_size, c.train.threads) for c in throughput.configs(options)]
    small = ViTConfig(size="s", image_size=112)
    large = ViTConfig(size="l", patch_size=14, image_size=112)
    assert found == [(small, 2, 3), (small, 4, 3), (large, 2, 3), (large, 4, 3)]
    assert [contest.num_classes(c) for c in throughput.configs(options)] == [1000] * 4


def test_user_errors(throughput, capsys):
    for words, expected in (
        ("--sizes q", "sizes: expected ti, s, b, l, h"),
        ("--sizes s/x", "got s/x"),
        ("--peers keras", "peers: expected some of timm,"),
        ("--profile jax", "profile: expected vitral"),
        ("--rounds 0", "rounds, seconds: expected numbers above 0"),
        ("--recipe nothing", "recipe"),
        ("--device cpu --largest-batch", "largest-batch: expected a CUDA GPU, got a cpu device"),
    ):
        assert throughput.main(words.split()) == 2
        assert expected in capsys.readouterr().err


def test_bench_model_prints_a_row_for_each_model(capsys):
    words = "--model.depth 1 --train.batch-size 2 --train.threads 1".split()
    assert main(["bench", "model", "digits", "--peers", *words]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines()[2:-1]]
    assert names == (["vitral", *PEERS] if HAS_TIMM else ["vitral"])
    assert "training steps of 2 images of 8 pixels, 10 classes" in out


@needs_timm
@pytest.mark.parametrize("size", ["ti", "s", "b", "l"])
def test_peers_are_the_models_that_timm_registers(size):
    """A peer built from the base model has the shapes of timm's model of that size."""
    import timm

    name = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}[size]
    registered = {"timm": f"vit_{name}_patch16_224"}
    if size != "ti":
        registered["timm-rope"] = f"vit_{name}_patch16_rope_224"
    with torch.device("meta"):
        for peer, timm_name in registered.items():
            built = PEERS[peer](ViTConfig(size=size), 1000)
            expected = shapes(timm.create_model(timm_name))
            assert shapes(built) == {n: s for n, s in expected.items() if "gamma" not in n}


def shapes(module: nn.Module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@needs_timm
@pytest.mark.parametrize("recipe", ["digits", "cifar10", "imagenette128"])
@pytest.mark.parametrize("peer", list(PEERS))
def test_peers_have_the_shape_of_a_recipe(recipe, peer):
    config = settings.load(recipe).model
    with torch.device("meta"):
        model = PEERS[peer](config, 10)
        assert model(torch.zeros(2, 3, config.image_size, config.image_size)).shape == (2, 10)
    own = ViT(config, 10)
    assert len(model.blocks) == len(own.blocks)
    assert model.blocks[0].mlp.fc1.weight.shape == own.blocks[0].ffn.expand.weight.shape
    assert model.num_prefix_tokens == own.num_prefix
    assert any("q_norm" in name for name, _ in model.named_parameters()) == config.qk_norm
    assert any("gamma" in n for n, _ in model.named_parameters()) == (config.layer_scale > 0)


def by_hand(N, dim, depth, width_qkv, patch, classes):
    """Two FLOPs per multiply-add; a block: qkv, scores, values, projection, FFN."""
    block = N * dim * width_qkv + 2 * N * N * dim + N * dim * dim + 2 * N * dim * 4 * dim
    return 2 * ((N - 1) * 3 * patch**2 * dim + depth * block + dim * classes)


@needs_timm
def test_flops_of_timms_small_vit_match_values_by_hand():
    config = Config(model=ViTConfig(size="s"))
    assert by_hand(197, 384, 12, 3 * 384, 16, 1000) == 9_197_764_608

    def counted(build):
        with torch.device("meta"):
            return forward_flops(build(config.model, 1000).eval(), 224)

    assert counted(PEERS["timm"]) == counted(PEERS["timm-rope"]) == 9_197_764_608
    grouped = by_hand(197, 384, 12, (6 + 2 * 2) * 64, 16, 1000)
    assert counted(PEERS["timm-rope-gqa"]) == grouped == count_flops(config.model, 1000)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("matmul", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"),
        ("matmul", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas"),
        ("matmul", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128>"),
        ("matmul", "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>"),
        ("matmul", "triton_tem_fused_addmm_3"),
        ("matmul", "_gelu_linear"),
        ("matmul", "_gelu_backward"),
        ("matmul", "aten::addmm"),
        ("matmul", "aten::mkldnn_convolution"),
        (
            "attention",
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::bf16>>",
        ),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7"),
        ("attention", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        ("attention", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
        ("optimizer", "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>"),
        ("optimizer", "aten::_fused_adamw_"),
        ("optimizer", "aten::_foreach_norm"),
        ("optimizer", "aten::linalg_vector_norm"),
        ("elementwise", "triton_per_fused__fused_rms_norm_add_mul_5"),
        ("elementwise", "triton_poi_fused_gelu_gelu_backward_12"),
        ("elementwise", "triton_per_fused__to_copy_add_div_linalg_vector_norm_mul_pow_rsqrt_0"),
        ("elementwise", "triton_poi_fused__scaled_dot_product_flash_attention_backward_cat_11"),
        ("elementwise", "void at::native::vectorized_elementwise_kernel<4, AddFunctor<float>>"),
        ("elementwise", "void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float>>>"),
        ("elementwise", "aten::native_layer_norm_backward"),
        ("elementwise", "aten::mul"),
        ("copy", "Memcpy DtoD (Device -> Device)"),
        ("copy", "void at::native::elementwise_kernel<direct_copy_kernel_cuda>"),
        ("copy", "void at::native::CatArrayBatchedCopy_aligned16_contig<OpaqueType<4u>>"),
        ("copy", "aten::cat"),
        ("other", "aten::view"),
        ("other", "void (anonymous namespace)::distribution_philox<float>"),
    ],
)
def test_kernels_are_classified_by_name(kind, name):
    assert kind_of(name) == kind


def test_fractions_of_a_profile_and_its_longest_entries():
    entries = [Entry(f"gemm_{i}", "matmul", float(i), 2.0) for i in range(1, 20)]
    found = summarize([*entries, Entry("flash", "attention", 10.0, 1.0)])
    assert found["ms"] == 200
    assert found["shares"]["matmul"] == pytest.approx(0.95)
    assert found["shares"]["attention"] == pytest.approx(0.05)
    assert [entry["ms"] for entry in found["top"]] == [*range(19, 9, -1), 10, *range(9, 5, -1)]
    assert found["top"][0]["share"] == pytest.approx(19 / 200)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 9, 64, 100, 127, 1000, 5000])
def test_the_largest_batch_is_found_to_an_eighth(most):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    found = memory.largest(fits)
    assert found <= most
    assert found % 2 == 0
    step = max(2, 1 << max(0, most.bit_length() - 4))
    assert found + step > most
    assert len(tried) < 18


def test_random_targets_give_gradients():
    """Uniform targets equal the initial outputs, so gradients would only be rounding errors."""
    training = Training(settings.load("digits", ["--train.batch-size", "2"]), 10, 8)
    training.accumulator.accumulate(training.batch, last=True)
    assert training.model.head.weight.grad.norm() > 1e-2


def test_a_batch_that_does_not_fit_is_a_user_error(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    config = settings.load("digits", ["--train.batch-size", "4"])
    with pytest.raises(UserError, match="train with 4 images of 8 pixels does not fit"):
        contest.compare(config, "train", {"vitral": full}, 1)
