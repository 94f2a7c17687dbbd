"""How programs are compiled in the tests, whose time is mostly compilation of what runs for milliseconds."""

import os
import subprocess
import sys


def known(flags):
    """Return the flags that the installed jaxlib knows; an unknown one in XLA_FLAGS aborts the process."""
    # CompileOptions reads XLA_FLAGS. It takes a quarter of a second where jax takes seconds.
    program = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]

    def run(chosen):
        environment = os.environ | {"XLA_FLAGS": " ".join(chosen)}
        return subprocess.run(program, env=environment, capture_output=True, timeout=60).returncode == 0

    return list(flags) if run(flags) else [flag for flag in flags if run([flag])]


# Halves the time. Text and memory of the programs stay the same, except for the fusion emitters, which
# jaxlib 0.12 always uses.
_EMITTERS = "xla_cpu_use_fusion_emitters"
_FLAGS = known(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        f"--{_EMITTERS}=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
QUICK = " ".join(_FLAGS)
# For `compile`, where a test reads text or memory of a program: the options of programs outside the tests.
AS_OUTSIDE = {_EMITTERS: True} if f"--{_EMITTERS}=false" in _FLAGS else None
