"""How programs are compiled in the tests, whose time is mostly compilation of what runs for milliseconds."""

# Half of that time goes, and text and memory of the programs stay, but for the fusion emitters.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# For `compile`, where a test reads text or memory of a program: those that it has outside of the tests.
AS_OUTSIDE = {"xla_cpu_use_fusion_emitters": True}
