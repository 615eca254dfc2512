"""What is run for docs/results.md: one row per setting, which `python -m benchmark.run_group` reads.

The arms and seeds are those of docs/protocol.md. A setting's name is the folder of its records in
benchmark/results/. Its flags are those of the algorithm file, beside the file's own defaults. In flags {seed}
and {fold} are filled in as in run_seeds.
"""

from typing import NamedTuple

ONE_SEED_PER_FOLD = (1, 2, 3, 4)
FOLD = "tiny/prompts/fold_{fold}"
ON_TEST_PROMPTS = (  # what all runs that are reported share
    "--eval-noises 2 --eval-wordings --eval-seed {seed} "
    f"--prompts {FOLD}/train.jsonl --eval-prompts {FOLD}/test.jsonl"
)
ON_TEST_TEXTS = (
    "--rewards ocr --eval-noises 2 --eval-seed {seed} "
    f"--prompts {FOLD}/text_train.jsonl --eval-prompts {FOLD}/text_test.jsonl"
)
ON_TEST_EDITS = (
    "--model tiny/flux --rewards edit --guidance-scale 3 --num-iterations 60 --learning-rate 3e-4 "
    "--lm-learning-rate 5e-4 --eval-noises 2 --eval-seed {seed} "
    f"--prompts {FOLD}/edit_reworded_train.jsonl --eval-prompts {FOLD}/edit_reworded_test.jsonl"
)
FLUX = "--model tiny/flux --guidance-scale 3"
EVAL_EVERY = {  # iterations: a default run is evaluated before, once or twice on the way, and after
    "flow_grpo": 64,
    "superflow": 48,
    "fdfo": 48,
    "promptrl": 32,
    "promptloop": 32,
}
NOT_YET = {  # arms of the protocol that have no row here yet
    "flow_grpo/soft",
    "promptloop/soft",
    "promptrl/tags_*",
}


class Setting(NamedTuple):
    """A row of the table."""

    name: str  # FILE/NAME
    own_flags: str  # what makes the setting, "" for the defaults of the file
    meaning: str  # a sentence for readers
    shared_flags: str = ON_TEST_PROMPTS

    @property
    def algorithm(self):
        return self.name.split("/")[0]

    @property
    def script(self):
        return f"{self.algorithm}.py"

    @property
    def flags(self):
        """All flags of the setting's runs, as a list of words."""
        eval_every = ["--eval-every", str(EVAL_EVERY[self.algorithm])]
        return self.shared_flags.split() + eval_every + self.own_flags.split()


GROUPS = {
    "defaults": [
        Setting("flow_grpo/default", "", "Flow-GRPO as the file has it"),
        Setting("superflow/default", "", "SuperFlow as the file has it"),
        Setting("fdfo/default", "", "FDFO as the file has it"),
        Setting("promptrl/default", "", "PromptRL as the file has it"),
        Setting("promptloop/default", "", "PromptLoop as the file has it"),
    ],
    "flow_grpo": [
        Setting("flow_grpo/iterations_96", "--num-iterations 96", "as many images as SuperFlow and FDFO"),
        Setting("flow_grpo/kl", "--kl-coef 0.04", "a penalty for leaving the base model"),
        Setting("flow_grpo/all_steps", "--sde-window 0", "every step is sampled with noise and trained"),
        Setting("flow_grpo/text", "--num-iterations 96", "written text", ON_TEST_TEXTS),
    ],
    "superflow": [
        Setting("superflow/without_prompt_choice", "--pool 1", "prompts in the order of the file"),
        Setting("superflow/without_group_sizes", "--num-bins 1", "the same number of images for each prompt"),
        Setting("superflow/without_tracker", "--baseline group", "the group's mean is the baseline"),
        Setting("superflow/without_step_credit", "--no-step-credit", "each step has the same advantage"),
        Setting("superflow/text", "", "written text", ON_TEST_TEXTS),
    ],
    "fdfo": [
        Setting("fdfo/guidance_2", "--guidance-scale 2", "trained and evaluated at guidance scale 2"),
    ],
    "promptrl": [
        Setting("promptrl/flow_only", "--num-original-prompts 8", "the flow model alone, no rewrites"),
        Setting("promptrl/lm_only", "--trained lm", "the language model alone"),
        Setting("promptrl/originals_0", "--num-original-prompts 0", "all images from rewrites"),
        Setting("promptrl/originals_1", "--num-original-prompts 1", "one image per prompt from the prompt"),
        Setting("promptrl/originals_4", "--num-original-prompts 4", "half of the images from the prompt"),
    ],
    "edit": [
        Setting("promptrl/edit_both", "", "edits: both models learn", ON_TEST_EDITS),
        Setting(
            "promptrl/edit_flow_only",
            "--num-original-prompts 8",
            "edits: the flow model alone, no rewrites",
            ON_TEST_EDITS,
        ),
        Setting("promptrl/edit_lm_only", "--trained lm", "edits: the language model alone", ON_TEST_EDITS),
    ],
    "flux": [
        Setting(
            "flow_grpo/flux",
            FLUX + " --num-prompts-per-iteration 32 --num-images-per-prompt 8",
            "Flow-GRPO on tiny/flux: more prompts, of fewer images each",
        ),
        Setting("superflow/flux", FLUX, "SuperFlow on tiny/flux"),
        Setting("fdfo/flux", FLUX, "FDFO on tiny/flux"),
        Setting("promptrl/flux", FLUX, "PromptRL on tiny/flux"),
        Setting("promptloop/flux", FLUX, "PromptLoop on tiny/flux"),
    ],
    "promptloop": [
        Setting("promptloop/one_refinement", "--num-refinements 1", "the prompt is written once, beforehand"),
        Setting("promptloop/no_preview", "--feedback none", "refinements that see no image"),
        Setting("promptloop/shuffled_previews", "--feedback shuffled", "refinements that see a wrong image"),
    ],
}
