"""TRL's GRPOTrainer on a policy and tasks of Hone: seconds and tokens of each step, as a JSON line.

Invariant: nothing of Hone is imported, and TRL only when training begins: this module runs in TRL's
environment (`benchmarks.trl_environment`), while Hone takes the rule from it in its own. So both
systems train the same weights on the same tasks by the same rule and objective. TRL generates with
transformers, without recomputing activations and without a reference model. By hand: `PYTHON -m
benchmarks.trl_peer --policy DIR --tasks FILE`, where `PYTHON` is what `python -m
benchmarks.trl_environment` prints.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

EVEN = frozenset("02468")
TAIL_CHARS = 8192
MEAN_LENGTH = "completions/mean_length"


def ends_even(_prompt: str, completion: str, _reference: str) -> float:
    """1 for a completion that ends in an even digit: half of random ones, however long."""
    return float(completion[-1:] in EVEN)


def last_line_is_right(_prompt: str, completion: str, reference: str) -> float:
    """1 where the last line that is not blank is the number `reference`: what Hone's `task`
    verifier with `extract: last_line` says of reasoning_gym's chain_sum.
    """
    _, end, rest = completion.rpartition("</think>")
    answer = "" if not end and "<think>" in completion else rest[-TAIL_CHARS:]
    line = answer.rstrip().rpartition("\n")[2].strip()
    try:
        return float(Decimal(line.replace(",", "")) == Decimal(reference))
    except ArithmeticError:  # no number
        return 0.0


REWARDS = {reward.__name__: reward for reward in (ends_even, last_line_is_right)}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One step to warm up and `options.steps` more; `step_s` and `tokens` are of these.

    `saved` has seconds of training from the first step's beginning, without those of saving.
    """
    import torch
    import transformers
    import trl
    from datasets import Dataset

    rule = REWARDS[options.reward]
    ends: list[float] = []  # in seconds of training
    saved: list[dict[str, float]] = []

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.began = 0.0  # later by what was spent on saving

        def on_train_begin(self, *_arguments: Any, **_more: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_arguments: Any, model: Any, **_more: Any) -> None:
            now = time.perf_counter()
            ends.append(now - self.began)
            if options.save_every and len(ends) % options.save_every == 0:
                save(model, Path(options.policy), Path(options.save_in) / f"step-{len(ends)}")
                saved.append({"step": len(ends), "seconds": ends[-1]})
                self.began += time.perf_counter() - now

    def reward(completions: list[Any], reference: list[str], **_more: Any) -> list[float]:
        texts = [turns[-1]["content"] for turns in completions]
        return [rule("", text, gold) for text, gold in zip(texts, reference, strict=True)]

    rows = [json.loads(line) for line in Path(options.tasks).read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="hone-trl-") as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            fp16=False,
            use_vllm=False,
            num_generations=options.group_size,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=options.samples // options.micro_batch,
            gradient_checkpointing=False,
            max_completion_length=options.max_new_tokens,
            temperature=options.temperature,
            top_p=1.0,
            top_k=0,
            # Hone's `policy_gradient` and `grpo` as they are by default: each loss divided by the
            # tokens of the whole step, rewards by the unbiased std of their group.
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            scale_rewards="group",
            mask_truncated_completions=False,
            beta=0.0,  # no reference model
            num_iterations=1,
            max_steps=options.steps + 1,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                options.policy, dtype=torch.float32
            ),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(
                options.policy, padding_side="left"
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    lengths = [row[MEAN_LENGTH] for row in history if MEAN_LENGTH in row]
    step_s = [after - before for before, after in pairwise(ends)]
    if len(step_s) != options.steps or len(lengths) != options.steps + 1:
        raise RuntimeError(f"{len(ends)} steps and {len(lengths)} logs of {options.steps + 1}")
    return {
        "system": "trl",
        "version": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(next(trainer.model.parameters()).dtype),
        "num_parameters": trainer.model.num_parameters(),
        "micro_batch": options.micro_batch,
        "median_step_s": median(step_s),
        "step_s": step_s,
        "tokens": [options.samples * length for length in lengths[1:]],
        "saved": saved,
        "reward": next((row["reward"] for row in reversed(history) if "reward" in row), None),
    }


def save(model: Any, start: Path, place: Path) -> None:
    """The weights of `model` at `place`; tokenizer and settings are those of the policy that
    training began with, not as TRL may have changed them.
    """
    model.save_pretrained(place)
    for file in start.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, place)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_peer")
    parser.add_argument("--policy", required=True, help="a Hugging Face directory")
    parser.add_argument("--tasks", required=True, help="JSON lines of prompt and reference")
    parser.add_argument("--samples", type=int, default=128, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--reward", choices=sorted(REWARDS), default=ends_even.__name__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 saves nothing")
    parser.add_argument("--save-in", help="a folder, for the directories step-1, step-2, ...")
    options = parser.parse_args(arguments)
    if options.samples % options.micro_batch or options.samples % options.group_size:
        parser.error("--samples must be a multiple of --micro-batch and of --group-size")
    if options.save_every and not options.save_in:
        parser.error("--save-every needs --save-in")
    return options


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(json.dumps(train(parsed(sys.argv[1:]))), flush=True)
