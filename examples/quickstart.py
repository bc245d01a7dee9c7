"""The whole pipeline in Python, on any two models that share a tokenizer.

python examples/quickstart.py TEACHER STUDENT PROMPTS.jsonl OUTPUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import lopd_store
import lopd_train


def main(teacher: str, student: str, prompts: str, output: Path, *, tokens: int = 96, steps: int = 40) -> float:
    """Everything from prompts to a trained student; returns by how much the held-out reverse KL fell, in nats."""
    # The teacher writes the SFT data, and SFT turns the student into the reference policy.
    data, policy = output / "sft.parquet", output / "sft"
    lopd_store.generate(model=teacher, prompts=prompts, output=data, max_response_tokens=tokens)
    sft = replace(lopd_train.SFT, steps=steps, learning_rate=3e-4, batch_rollouts=8)
    lopd_train.train_sft(model=student, data=data, output=policy, config=sft)

    # The reference policy samples rollouts; the same teacher scores them once. Provenance travels in the files.
    rollouts = output / "rollouts.parquet"
    lopd_store.generate(model=policy, prompts=prompts, output=rollouts, max_response_tokens=tokens, seed=1)
    artifact = lopd_store.build(teacher=teacher, rollouts=rollouts, output=output / "artifact")
    lopd_store.verify(artifact.path).require_ok()

    # Training reads the artifact. It would refuse one whose SFT teacher is not the teacher that scored it.
    opd = replace(lopd_train.OPD, steps=steps, learning_rate=5e-5, batch_rollouts=8)
    result = lopd_train.train(artifact=artifact.path, student=policy, output=output / "opd", config=opd)
    assert result.first_eval and result.last_eval
    before, after = result.first_eval["reverse_kl"], result.last_eval["reverse_kl"]
    print(f"held-out reverse KL: {before:.3f} -> {after:.3f} nat per position")
    return float(before - after)


if __name__ == "__main__":
    Path(sys.argv[4]).mkdir(parents=True)
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
