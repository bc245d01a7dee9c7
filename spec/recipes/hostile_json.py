"""Manifests that are wrong: as JSON, as sealed documents, and in what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lopd_store.manifest import sealed

Text = Callable[[bytes], bytes]


def _annotated(text: str | bytes) -> Text:
    """The manifest with this text for its annotations."""
    text = text if isinstance(text, bytes) else text.encode()
    return lambda data: data.replace(b'"annotations": {}', b'"annotations": ' + text)


TEXTS: dict[str, Text] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "two_documents": lambda data: data + data,
    "nul_after_it": lambda data: data + b"\0",
    "list": lambda data: b"[" + data + b"]",
    "byte_order_mark": lambda data: b"\xef\xbb\xbf" + data,
    "utf_16": lambda data: data.decode().encode("utf-16"),
    "not_utf_8": _annotated(b'{"name": "caf\xe9"}'),
    "overlong_utf_8": _annotated(b'{"name": "\xc0\xaf"}'),
    "surrogate_in_utf_8": _annotated(b'{"name": "\xed\xa0\x80"}'),
    "half_a_surrogate_pair": _annotated('{"name": "\\ud800"}'),
    "other_half_of_a_surrogate_pair": _annotated('{"name": "\\udc00 "}'),
    "name_twice": lambda data: data.replace(b"{", b'{"format": "lopd",', 1),
    "name_twice_inside": _annotated('{"name": 1, "name": 1}'),
    "name_twice_by_an_escape": _annotated('{"name": 1, "n\\u0061me": 1}'),
    "nan": _annotated('{"number": NaN}'),
    "infinity": _annotated('{"number": Infinity}'),
    "number_beyond_64_bits": _annotated('{"number": 1e999}'),
    "integer_of_21_digits": _annotated('{"number": 123456789012345678901}'),
    "integer_of_4000_digits": _annotated('{"number": ' + 4000 * "9" + "}"),
    "plus_sign": _annotated('{"number": +1}'),
    "python_literal": _annotated('{"flag": True}'),
    "comma_before_the_end": _annotated('{"name": 1,}'),
    "comment": _annotated("{/* nothing */}"),
    "control_character_in_a_string": _annotated('{"name": "\n"}'),
    "33_deep": _annotated('{"deep": ' + 31 * "[" + 31 * "]" + "}"),
    "3000_deep": _annotated(3000 * "[" + 3000 * "]"),
    "without_format": lambda data: data.replace(b'  "format": "lopd",\n', b""),
    "another_format": lambda data: data.replace(b'"format": "lopd"', b'"format": "lopd-view"'),
}


def _changed(change: Callable[[dict[str, Any]], object]) -> Text:
    def text(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()

    return text


AFTER_SEALING: dict[str, Text] = {
    "count_changed": _changed(lambda value: value["counts"].update(rollouts=3)),
    "digest_changed": _changed(lambda value: value["parts"][0]["files"]["tokens"].update(xxh3_128=32 * "0")),
    "member_added": _changed(lambda value: value.update(more=1)),
    "without_seal": _changed(lambda value: value.pop("seal")),
    "seal_null": _changed(lambda value: value.update(seal=None)),
    "seal_in_capitals": _changed(lambda value: value.update(seal=value["seal"].upper())),
}


def _dumped(**options: Any) -> Text:
    return lambda data: json.dumps(json.loads(data), **{"ensure_ascii": False, **options}).encode() + b"\n"


def _reversed(data: bytes) -> bytes:
    return json.dumps(dict(reversed(json.loads(data).items())), indent=2, ensure_ascii=False).encode() + b"\n"


OTHER_FORMS: dict[str, Text] = {
    "on_one_line": _dumped(sort_keys=True),
    "four_spaces": _dumped(sort_keys=True, indent=4),
    "names_in_another_order": _reversed,
    "without_the_last_newline": lambda data: data[:-1],
    "carriage_returns": lambda data: data.replace(b"\n", b"\r\n"),
    "number_in_another_form": lambda data: data.replace(b'"temperature": 1.0', b'"temperature": 1e0'),
    "escaped_letter": lambda data: data.replace(b'"lopd"', b'"l\\u006fpd"'),
    "characters_escaped": lambda data: sealed(json.loads(data) | {"annotations": {"ü": "ü"}}).replace(
        "ü".encode(), b"\\u00fc"
    ),
}

DIGEST = "sha256:" + 64 * "a"
GRIDS = "encoding.grids.topk_logprobs"
OF_SEVERAL_DOMAINS: dict[str, dict[str, tuple[str, Any]]] = {  # of the inputs math and code, with 1 and 2 parts
    "A018": {
        "checkpoint_with_one_sft_object": ("inputs.0.rollouts.policy_checkpoint.sft", lambda sft: sft[0]),
        "checkpoint_without_sft": ("inputs.0.rollouts.policy_checkpoint.sft", []),
        "checkpoint_with_65_sfts": ("inputs.0.rollouts.policy_checkpoint.sft", lambda sft: 65 * sft),
        "checkpoint_with_a_domain_twice": ("inputs.0.rollouts.policy_checkpoint.sft.0.domain", "code"),
        "checkpoint_with_an_sft_without_domain": ("inputs.0.rollouts.policy_checkpoint.sft.1.domain", None),
        "checkpoint_with_a_domain_in_capitals": ("inputs.0.rollouts.policy_checkpoint.sft.1.domain", "Code"),
    },
    "A024": {
        "null_beside_a_name": ("inputs.1.domain", None),
        "twice": ("inputs.1.domain", "math"),
        "in_capitals": ("inputs.1.domain", "Code"),
        "empty": ("inputs.1.domain", ""),
        "of_65_characters": ("inputs.1.domain", 65 * "c"),
        "that_begins_with_a_dot": ("inputs.1.domain", ".code"),
        "that_climbs": ("inputs.1.domain", "../code"),
        "with_a_newline": ("inputs.1.domain", "code\n"),
        "with_a_digit_of_another_script": ("inputs.1.domain", "code\u0663"),
    },
    "A025": {
        "another_tokenizer": ("inputs.1.teacher.tokenizer", "sha256:" + 64 * "0"),
        "a_greater_vocabulary": ("inputs.1.teacher.vocab_size", lambda size: size + 1),
    },
    "A026": {
        "an_input_without_parts": ("parts.0.input", 1),
        "the_last_input_first": ("parts", lambda parts: [part | {"input": 1 - part["input"]} for part in parts]),
        "parts_that_go_back": ("parts.2.input", 0),
        "beyond_the_last_input": ("parts.2.input", 2),
    },
}
CODE_OF = {"version": "A013", "inputs.0.scoring": "A018", "encoding": "A017", "parts": "A016", "text": "A014"}
EDITS: dict[str, dict[str, tuple[str, Any]]] = {
    "A013": {
        "next_major": ("version", "2.0"),
        "major_0": ("version", "0.9"),
        "without_minor": ("version", "1"),
        "three_numbers": ("version", "1.0.0"),
        "leading_zero": ("version", "01.0"),
        "white_space": ("version", "1.0\n"),
        "other_digits": ("version", "1.\u0661"),
        "five_digits": ("version", "1.99999"),
        "null": ("version", None),
    },
    "A014": {
        "unknown_member": ("more", 1),
        "text_is_a_number": ("text", 1),
        "reference_logprobs_is_text": ("reference_logprobs", "true"),
        "annotations_is_a_list": ("annotations", []),
    },
    "A015": {
        "rollouts_do_not_add_up": ("counts.rollouts", 3),
        "tokens_do_not_add_up": ("counts.tokens", 0),
        "negative": ("counts.rollouts", -2),
        "fraction": ("counts.rollouts", 2.0),
        "flag": ("counts.rollouts", True),
        "null": ("counts.rollouts", None),
        "too_great": ("counts.rollouts", 1 << 53),
        "unknown_member": ("counts.more", 1),
        "list": ("counts", [2, 11, 7, 20]),
    },
    "A016": {
        "no_parts": ("parts", []),
        "part_with_an_unknown_member": ("parts.0.more", 1),
        "file_of_another_kind": ("parts.0.files.rewards", {}),
        "file_is_null": ("parts.0.files.topk", None),
        "path_that_climbs": ("parts.0.files.tokens.path", "parts/../../../etc/passwd"),
        "absolute_path": ("parts.0.files.tokens.path", "/etc/passwd"),
        "path_of_another_system": ("parts.0.files.tokens.path", "parts\\00000.tokens.zarr.zip"),
        "path_by_a_detour": ("parts.0.files.tokens.path", "parts/./00000.tokens.zarr.zip"),
        "path_of_another_part": ("parts.0.files.tokens.path", "parts/00001.tokens.zarr.zip"),
        "path_with_a_nul": ("parts.0.files.tokens.path", "parts/00000.tokens.zarr.zip\0"),
        "path_is_an_address": ("parts.0.files.tokens.path", "https://example.org/00000.tokens.zarr.zip"),
        "size_negative": ("parts.0.files.tokens.size", -1),
        "size_is_a_flag": ("parts.0.files.tokens.size", True),
        "size_above_4_gib": ("parts.0.files.tokens.size", 1 << 32),
        "size_near_2_to_the_53": ("parts.0.files.tokens.size", (1 << 53) - 1),
        "sha256_in_capitals": ("parts.0.files.tokens.sha256", "sha256:" + 64 * "A"),
        "sha256_too_short": ("parts.0.files.tokens.sha256", DIGEST[:-1]),
        "sha256_with_a_newline": ("parts.0.files.tokens.sha256", DIGEST + "\n"),
        "xxh3_too_short": ("parts.0.files.tokens.xxh3_128", 31 * "a"),
        "xxh3_with_a_sign": ("parts.0.files.tokens.xxh3_128", "-" + 31 * "a"),
        "count_negative": ("parts.0.counts.tokens", -1),
        "input_negative": ("parts.0.input", -1),
        "input_is_a_flag": ("parts.0.input", False),
        "input_64": ("parts.0.input", 64),
    },
    "A017": {
        "unknown_profile": ("encoding.profile", "lossy"),
        "exact_with_grids": ("encoding.profile", "exact"),
        "unknown_rule": ("encoding.selection.rule", "top_p"),
        "k_min_0": ("encoding.selection.k_min", 0),
        "k_min_above_k_max": ("encoding.selection.k_min", 5),
        "k_max_32768": ("encoding.selection.k_max", 32_768),
        "k_max_with_a_fraction": ("encoding.selection.k_max", 4.0),
        "coverage_0": ("encoding.selection.coverage", 0),
        "coverage_above_1": ("encoding.selection.coverage", 1.001),
        "coverage_is_a_flag": ("encoding.selection.coverage", True),
        "unknown_member": ("encoding.steps", {}),
        "only_one_grid": (GRIDS, None),
        "grid_without_segments": (GRIDS, []),
        "grid_of_17_segments": (GRIDS, [[float(start), 0.0625] for start in range(17)]),
        "segment_of_three": (GRIDS, [[0.0, 0.0625, 0.125]]),
        "first_segment_not_from_0": (GRIDS, [[1.0, 0.0625]]),
        "step_no_power_of_two": (GRIDS, [[0.0, 0.1]]),
        "step_above_1": (GRIDS, [[0.0, 2.0]]),
        "step_too_fine": (GRIDS, [[0.0, 2.0**-21]]),
        "step_negative": (GRIDS, [[0.0, -0.0625]]),
        "steps_that_shrink": (GRIDS, [[0.0, 0.125], [1.0, 0.0625]]),
        "segments_that_go_back": (GRIDS, [[0.0, 0.0625], [2.0, 0.125], [1.0, 0.25]]),
        "segments_in_broken_steps": (GRIDS, [[0.0, 0.5], [0.75, 1.0]]),
        "more_levels_than_codes": (GRIDS, [[0.0, 2.0**-20], [1.0, 1.0]]),
        "segment_far_away": (GRIDS, [[0.0, 2.0**-20], [1e308, 1.0]]),
        "bound_too_small": ("encoding.bounds.topk_logprobs", 0.0),
    },
    "A018": {
        "inputs_is_null": ("inputs", None),
        "inputs_is_an_object": ("inputs", {}),
        "no_inputs": ("inputs", []),
        "65_inputs": ("inputs", lambda inputs: 65 * inputs),
        "domain_is_a_number": ("inputs.0.domain", 1),
        "sft_of_a_domain_without_a_name": ("inputs.0.sft.domain", False),
        "unknown_member": ("inputs.0.more", 1),
        "rollouts_file_is_a_path": ("inputs.0.rollouts_file", "rollouts.parquet"),
        "teacher_is_a_name": ("inputs.0.teacher", "acme/teacher"),
        "weights_are_no_digest": ("inputs.0.teacher.weights", "sha256:"),
        "chat_template_is_text": ("inputs.0.teacher.chat_template", "{{ prompt }}"),
        "vocab_size_0": ("inputs.0.teacher.vocab_size", 0),
        "vocab_size_is_a_flag": ("inputs.0.teacher.vocab_size", True),
        "output_width_2_to_the_31": ("inputs.0.teacher.output_width", 1 << 31),
        "unknown_member_of_the_teacher": ("inputs.0.teacher.more", 1),
        "license_is_a_name": ("inputs.0.license", "apache-2.0"),
        "license_of_no_characters": ("inputs.0.license.id", ""),
        "license_of_501_characters": ("inputs.0.license.link", 501 * "x"),
        "gated_by_a_word": ("inputs.0.license.gated", "auto"),
        "engine_is_a_number": ("inputs.0.scoring.engine", 1),
        "sft_of_another_status": ("inputs.0.sft.status", "guessed"),
        "unknown_sft_with_a_teacher": ("inputs.0.sft.status", "unknown"),
        "recorded_sft_without_a_teacher": ("inputs.0.sft.teacher", None),
        "sft_audit_is_a_verdict": ("inputs.0.sft_audit", "consistent"),
        "unknown_member_of_the_sft_audit": ("inputs.0.sft_audit.z", 0.1),
        "sft_audit_of_no_data": ("inputs.0.sft_audit.data", None),
        "sft_audit_of_negative_variance": ("inputs.0.sft_audit.variance", -1.0),
        "sft_audit_with_more_outside_than_positions": ("inputs.0.sft_audit.outside", 20_001),
        "rollouts_audit_without_sums": ("inputs.0.rollouts_audit", {}),
        "another_record": ("inputs.0.rollouts.record", "checkpoint"),
        "rollouts_is_a_list": ("inputs.0.rollouts", []),
        "policy_checkpoint_is_empty": ("inputs.0.rollouts.policy_checkpoint", {}),
        "temperature_negative": ("inputs.0.rollouts.sampling.temperature", -1.0),
        "prompts_are_no_digest": ("inputs.0.rollouts.prompts", ""),
        "seed_is_a_flag": ("inputs.0.rollouts.sampling.seed", True),
        "stop_is_a_text": ("inputs.0.rollouts.sampling.stop", "END"),
        "stop_at_nothing": ("inputs.0.rollouts.sampling.stop", ["END", ""]),
        "unknown_member_of_the_sampling": ("inputs.0.rollouts.sampling.top_k", 50),
    },
    "A019": {
        "processed_logprobs": ("inputs.0.scoring.logprobs", "processed"),
        "another_temperature": ("inputs.0.scoring.temperature", 0.7),
        "temperature_0": ("inputs.0.scoring.temperature", 0),
    },
}
