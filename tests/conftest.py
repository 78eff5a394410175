"""One pytest process has eight CPU devices: tests of meshes use them all, the others the first."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator

import pytest

# Tests compile much and compute little, here and in the processes that they start: fast machine code costs more than it
# brings. At this level XLA's older emitters take half the time of the newer ones. To be set before jax is imported.
_FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST_COMPILATION}".strip()

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

EXTENDED = re.compile(
    r"multiprocess/test_processes.*(two_processes_have|four_processes_have"
    r"|fault_at_every_start|local_launcher_restarts|a_stopped_process|resumes_in_one_on_another)"
    r"|faults/test_run_faults.*(killed_run_ends.*\[prefix_lm\]|exceeded_quota|revoked_permission|maintenance_notice"
    r"|spike_of_the_loss|damaged_newest|not_finite.*\[abort\])"
    r"|faults/test_eval_faults.*computed_once_despite_kills"
    r"|integration/test_study.*that_is_killed"
    r"|integration/test_fine_tuning.*(whose_answers_it_has_read|arguments_and_constants|a_classification_head)"
    r"|integration/test_eval_generate.*eval_of_older_steps"
    r"|integration/test_prepare\.py.*seqio_tasks"
    r"|integration/test_step_guard.*skipped_steps"
    r"|integration/test_block_diffusion.*held_out_text_is_learned"
    r"|integration/test_lora_training.*loss_falls"
    r"|integration/test_continue_published.*\[(umt5|modernbert)\]"
    r"|integration/test_export_command.*gives_the_completions.*\[prefix_lm\]"
    r"|evaluation/test_heldout_loss.*sharded_parameters"
    r"|kernels/test_quantized_matmul.*layout_of_inference"
    r"|faults/test_process_faults.*(\[save\]|\[15\]|\[abort\]|\[skip\]|killed_after_its_last_save|becomes_read_only"
    r"|frozen_file_system|storage_that_is_slow|of_a_metric_writer|stacks_are_printed|on_a_full_disk|did_not_answer"
    r"|coordinator_is_taken|loss_of_one_of_two|second_signal|sigterm_during)"
    r"|faults/test_generate_faults.*two_killed_processes"
    r"|data/test_seqio_register_mixtures.*registered_mixture_read_live"
    r"|data/test_seqio_live_dataset.*restored_pipeline"
    r"|decoding/test_generate_files.*greedy_decoding"
    r"|decoding/test_speculative.*\[((prefix_lm|learned|windows|decoder)-"
    r"|encoder_decoder-(choices|penalty|int8)|merged-greedy)"
    r"|decoding/test_continuous_batching.*\[(encoder_decoder|prefix_lm)\]"
    r"|decoding/test_engine.*\[(learned|multi-query|causal t5|prefix|unequal|first layer|five local to one"
    r"|shared experts|disentangled)\]"
    r"|decoding/test_beam_search.*(exhaustive\[(t5x long|no penalty)|independent_of_the_mesh\[causal_lm)"
    r"|export/test_export_model.*\[(unequal|local|local prefix|first layer|disentangled|learned|per-layer bias"
    r"|experts|some experts|gated prefix|blocks)\]"
    r"|models/test_seqio_rows.*\[(prefix_lm|causal_lm)-numbers\]"
    r"|models/test_electra.*outputs\[learned\]"
    r"|models/test_model_decoding.*\[(unequal|first layer|local|gated prefix)\]"
    r"|models/test_model.py.*(scan_unrolled.*\[changes[12]\]|separate_ones\[)"
    r"|adapters/test_lora.*\[(bert|mixtral)\]"
    r"|parallel/test_products.*(slices|gathered|expert2xcontext2xtensor2|expert4|encoder-context"
    r"|architectures.*-fsdp_context_tensor|greedy_tokens.*\[prefix_lm)\]"
    r"|parallel/test_meshes.*(-data_tensor|-fsdp|\[fsdp|mesh1|\[experts|discriminator.*\[data_fsdp_tensor)\]"
    r"|integration/test_resumed_optimizers.*\[(lion|lamb|adafactor)\]"
    r"|integration/test_mixture_training.*\[prefix_lm\]"
    r"|integration/test_docs_shell.*\[docs/(migrate-huggingface|finetune|encoders|studies|evaluation|seqio|adapters).md\]"
    r"|aot/test_compile.*(\[smoke:(prefix_lm|electra)\]|is_deterministic)"
    r"|aot/test_attention_kernels.*\[(decoder-flash|encoder-splash|all_gather)\]"
)
"""Slow tests, and compilations for TPUs, of cases that other tests of CI make unlikely to fail alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that CI leaves out, and that are run before a release."""
    for item in items:
        if any(map(item.get_closest_marker, ("slow", "aot"))) and EXTENDED.search(item.nodeid):
            item.add_marker(pytest.mark.extended)


MAX_MAPPINGS = 20_000
"""Memory mappings of a process above which the programs that its tests have compiled are dropped. Each has several,
Linux allows 65,530 per process (vm.max_map_count), and a compilation beyond that is a segmentation fault."""


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Drop compiled programs after a file of tests if there are very many."""
    yield
    try:
        with open("/proc/self/maps") as maps:
            mappings = sum(1 for _ in maps)
    except OSError:  # Another system than Linux.
        return
    if mappings > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()
