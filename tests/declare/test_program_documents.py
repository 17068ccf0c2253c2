"""Where each row and clause of the program's documents is held: every one names the tests that fail without it."""

from __future__ import annotations

import importlib

import pytest

from canvas_engineering import ClockSpec, ConnectionProgram, ConstraintSpec, LearningSpec, RegionProgram

PROGRAM, DISPATCH, COMPILER = "declare.test_program", "run.test_program_dispatch", "run.test_compiler"
ACTIVITY, EXPORTS = "run.test_activity", "run.test_exports"
CLOCKS, SCHEDULES, CONSTRAINTS = "declare.test_clock_ir", "run.test_scheduling", "declare.test_constraints"

# document, row: module and tests
HELD = {
    "families: role, learning, compile mode": (PROGRAM, "test_the_sets_and_the_families_are_the_published_ones"),
    "families: compile mode applied": (COMPILER, "test_every_family_has_its_default"),
    "carriers": (PROGRAM, "test_the_sets_and_the_families_are_the_published_ones"),
    "carriers: residual": (DISPATCH, "test_residuals_go_by_either_carrier_and_by_what_is_kept"),
    "carriers: diffusive, filter": (CONSTRAINTS, "test_monotonicity_goes_by_the_carrier"),
    "layer: operators derive from families": (PROGRAM, "test_every_pair_of_families_has_its_operator"),
    "layer: JSON": (PROGRAM, "test_json_keeps_every_field"),
    "layer: fields without family get defaults": (PROGRAM, "test_fields_become_region_programs"),
    "dispatch: operator, defaults": (PROGRAM, "test_every_operator_has_its_row"),
    "dispatch: operator write, act": (DISPATCH, "test_operators_that_replace_silence_the_others"),
    "dispatch: operator compress": (DISPATCH, "test_compress_pools"),
    "dispatch: operator retrieve, others": (DISPATCH, "test_operators_that_change_nothing"),
    "dispatch: explicit fields win": (PROGRAM, "test_explicit_fields_win_over_the_operator"),
    "dispatch: trigger": (DISPATCH, "test_triggers_see_the_summaries_at_the_beginning_of_the_step"),
    "dispatch: trigger syntax": (DISPATCH, "test_every_comparison_on_the_device"),
    "dispatch: write_mode replace, gate, add": (
        "run.test_dispatch",
        "test_replace_silences_the_others_and_gates_start_half_open",
    ),
    "dispatch: write_mode gate": (DISPATCH, "test_gates_are_learned_per_connection_and_fade_out"),
    "dispatch: mask_spec": (DISPATCH, "test_masks_of_programs_replace_the_connections_own"),
    "dispatch: identity": (DISPATCH, "test_regions_with_an_identity_are_read_through_their_slots"),
    "dispatch: constraints, equivariance": (
        CONSTRAINTS,
        "test_equivariance_goes_by_the_function_of_outgoing_connections",
    ),
    "dispatch: constraints, conservation": (
        CONSTRAINTS,
        "test_conservation_forbids_replacing_writes_whoever_declares_them",
    ),
    "dispatch: constraints, acyclic": (CONSTRAINTS, "test_acyclic_follows_reads_from_the_region"),
    "dispatch: constraints, forward_only": (CONSTRAINTS, "test_forward_only_compares_the_first_frames"),
    "dispatch: clock.expr": (SCHEDULES, "test_expressions_take_the_place_of_modes"),
    "dispatch: CortexRegistry": (DISPATCH, "test_edges_inside_a_cortex_run_its_backend"),
    "dispatch: isolated per cortex": (DISPATCH, "test_cortices_keep_their_backends_to_themselves"),
    "dispatch: LearningSpec resolution": (PROGRAM, "test_learning_falls_back_to_the_family_and_compile_mode_does_not"),
    "dispatch: everything at once": (DISPATCH, "test_a_step_is_the_oracle"),
    "deploy: freeze, runtime": (COMPILER, "test_freeze_stops_gradients_and_runtime_does_not"),
    "deploy: constant": (COMPILER, "test_constants_are_buffers_of_the_same_name_and_value"),
    "deploy: export": (EXPORTS, "test_exports_are_written_whole_checked_and_frozen"),
    "deploy: without a module": (COMPILER, "test_modes_go_by_region_learning_and_family"),
    "deploy: dead edges": (COMPILER, "test_what_is_left_is_a_smaller_plan_with_the_same_outputs"),
    "hybrid scheduling": (SCHEDULES, "test_learned_regions_are_the_scorers_and_the_others_the_clocks"),
    "api: ClockSpec.domain": (SCHEDULES, "test_domains_say_which_time_counts"),
    "api: ClockSpec.mode": (SCHEDULES, "test_unknown_clocks_are_refused"),
    "api: ClockSpec.period": (SCHEDULES, "test_periodic_clocks"),
    "api: ClockSpec.event_source": (SCHEDULES, "test_boundary_clocks"),
    "api: ClockSpec.event_threshold": (SCHEDULES, "test_event_clocks"),
    "api: ClockSpec.cooldown": (SCHEDULES, "test_periodic_clocks"),
    "api: ClockSpec.max_silence": (SCHEDULES, "test_periodic_clocks"),
    "api: ClockSpec.max_inner_steps": (SCHEDULES, "test_inner_steps_follow_for_internal_regions_that_fired"),
    "api: ClockSpec.expr": (SCHEDULES, "test_flat_cooldown_and_silence_stand_before_an_expression"),
    "api: LearningSpec.mode": (PROGRAM, "test_learning_falls_back_to_the_family_and_compile_mode_does_not"),
    "api: LearningSpec.losses": (PROGRAM, "test_learning_falls_back_to_the_family_and_compile_mode_does_not"),
    "api: LearningSpec.compile_mode": (COMPILER, "test_modes_go_by_region_learning_and_family"),
    "api: ConstraintSpec.equivariance": (CONSTRAINTS, "test_unknown_values_are_reported"),
    "api: ConstraintSpec.conservation": (CONSTRAINTS, "test_unknown_values_are_reported"),
    "api: ConstraintSpec.causal_direction": (CONSTRAINTS, "test_unknown_values_are_reported"),
    "api: ConstraintSpec.monotonicity": (CONSTRAINTS, "test_unknown_values_are_reported"),
    "api: RegionProgram.family": ("declare.test_canvas", "test_family_and_carrier_embeddings"),
    "api: RegionProgram.tags": (PROGRAM, "test_fields_become_region_programs"),
    "api: RegionProgram.carrier": (DISPATCH, "test_residuals_go_by_either_carrier_and_by_what_is_kept"),
    "api: RegionProgram.clock": (DISPATCH, "test_clocks_drive_the_active_set_and_inner_steps"),
    "api: RegionProgram.learning": (PROGRAM, "test_learning_falls_back_to_the_family_and_compile_mode_does_not"),
    "api: RegionProgram.compile_mode": (COMPILER, "test_unknown_modes_are_refused"),
    "api: RegionProgram.constraints": (
        CONSTRAINTS,
        "test_everything_is_reported_at_once_and_nothing_without_constraints",
    ),
    "api: RegionProgram.identity": (DISPATCH, "test_a_mask_of_pairs_says_who_reads_a_bank"),
    "api: ConnectionProgram.operator": (PROGRAM, "test_every_operator_has_its_row"),
    "api: ConnectionProgram.trigger": (DISPATCH, "test_triggers_without_summaries_never_fire"),
    "api: ConnectionProgram.write_mode": (PROGRAM, "test_the_write_mode_goes_by_program_connection_operator"),
    "api: ConnectionProgram.mask_spec": (PROGRAM, "test_the_programs_mask_wins_and_its_trigger_is_found"),
    "api: CanvasProgram, JSON": (PROGRAM, "test_the_json_form_is_the_published_one"),
    "api: CanvasProgram.summary": (PROGRAM, "test_summaries_count"),
    "api: evaluate_trigger": (PROGRAM, "test_triggers"),
    "api: resolve_operator_defaults": (PROGRAM, "test_explicit_fields_win_over_the_operator"),
    "issue: activity rebuilds nothing": (ACTIVITY, "test_a_hundred_changes_of_activity_rebuild_nothing"),
    "issue: activity compiles nothing": (ACTIVITY, "test_a_hundred_changes_of_activity_compile_once"),
    "issue: activity waits for nothing": (ACTIVITY, "test_a_hundred_changes_of_activity_wait_for_nothing_on_a_gpu"),
    "issue: one call a function": (ACTIVITY, "test_one_call_a_function_whatever_the_mix"),
    "issue: what skipping saves": ("house.test_belief_world", "test_it_compares_with_and_without_skipping"),
}


@pytest.mark.parametrize("row", HELD)
def test_every_row_has_a_test(row):
    module, name = HELD[row]
    assert callable(getattr(importlib.import_module(f"tests.{module}"), name, None)), f"{module} has no {name}"


def test_every_field_of_a_program_has_a_row():
    specs = (ClockSpec, LearningSpec, ConstraintSpec, RegionProgram, ConnectionProgram)
    fields = {f"api: {spec.__name__}.{field}" for spec in specs for field in spec.__dataclass_fields__}
    assert fields - HELD.keys() == set()
