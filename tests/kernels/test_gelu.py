"""The Triton kernels: their values in the interpreter, and their code compiled for a GPU."""

import pytest

pytest.importorskip("triton")


def test_products_match_float64(interpreted, case):
    found = interpreted["products"][case]
    assert found.keys() == {"before", "after", "result", "sums"}
    assert max(found.values()) < 1e-6, found


def test_kernels_compile_for_hopper(tmp_path, monkeypatch):
    """They use the tensor cores, and two programs fit into a multiprocessor's shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitral.kernels import gelu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "HAS_BIAS": True, "BLOCK_M": gelu.BLOCK_M, "BLOCK_N": gelu.BLOCK_N,
        "BLOCK_K": gelu.BLOCK_K, "GROUP": gelu.GROUP,
    }  # fmt: skip
    kinds = {"bias": "*fp32", "sums": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    for kernel in (gelu._gelu_linear, gelu._gelu_backward):
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in names
        }
        fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names)) if (i,) not in fixed}
        source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
        options = {"num_warps": gelu.WARPS, "num_stages": gelu.STAGES}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 232_448 / 2
