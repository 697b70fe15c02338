"""What every metric means, in one sentence; shown in the report, by TensorBoard readers and in the documentation."""

import re
from collections.abc import Mapping

METRICS: dict[str, str] = {
    "step": "Number of the row: updates done before it.",
    "reward/mean": "Weighted sum of the training rewards, mean over this step's images; noisy, for the prompts change.",
    "reward/std": "Spread of that sum over this step's images; near 0 there is nothing left to learn from.",
    "reward/group_std": "Spread within the images of one prompt, mean over prompts: what advantages are made of.",
    "reward/zero_std_groups": "Share of prompts whose images all scored the same; they teach nothing.",
    "reward/valid": "Share of this step's images for which every training reward gave a number.",
    "reward/<name>/mean": "This reward alone, unweighted, mean over this step's images.",
    "eval/reward/mean": "Weighted sum of the training rewards on held-out prompts and fixed noise: what to believe.",
    "eval/reward/<name>/mean": "This reward alone, whatever its role, on held-out prompts and fixed noise.",
    "eval/task/<task>": "Share of held-out images of this task that are right.",
    "eval/diversity": "Distance between held-out images of one prompt, over the base's; below 0.8 is a warning.",
    "eval/distance": "Root mean square pixel distance between held-out images of one prompt.",
    "eval/<detail>": "A detail that a reward reports beside its score, mean over the held-out images it applies to.",
    "eval_final/<metric>": "The same as eval/..., of the finished weights.",
    "kl": "Divergence of the trained steps from the base model's; where it is no penalty, measured now and then.",
    "kl_weight": "Weight of the penalty in this step, where it follows a target.",
    "anchor_age": "Steps since the penalty's reference was set to the policy, where it is reset.",
    "advantage/lambda/<reward>": "Multiplier of a reward that is to reach a bound: 0 while it does.",
    "advantage/gated": "Share of this step's images that the penalty is for, where it has a gate.",
    "runtime/reward/<name>/<metric>": "Failed tries, timeouts and pictures left out, of one reward in one step.",
    "time/reward/<name>_s": "Seconds spent in one reward.",
    "policy_loss": "The reward term alone, without penalties; its gradient teaches, its value says little.",
    "positive_loss": "Error of the implicit policy that is drawn towards good samples (DiffusionNFT).",
    "negative_loss": "Error of the implicit policy that is pushed away from bad samples (DiffusionNFT).",
    "old_deviate": "Mean square distance of the present velocity from the old weights' (DiffusionNFT).",
    "old_decay": "How much of the old weights was kept at the end of the step.",
    "old_gap": "How far the present likelihoods are from those under the old weights.",
    "teacher": "Mean square distance of the velocity from the teacher's, which follows the policy slowly.",
    "teacher_decay": "How much of the teacher was kept at the end of the step.",
    "group_weight": "Weight that a group's preference gave its samples (DGPO); 0.5 at the start.",
    "implicit_reward": "Reward that the change from the old weights implies.",
    "reward_error": "Mean square difference between the implied and the true reward differences.",
    "reward_with_graph": "Training reward of the pictures that the learner made to differentiate it.",
    "accuracy": "Share of pairs of which the policy prefers the winner more than the reference does.",
    "margin": "How much more than the reference the policy prefers winners over losers.",
    "winner_gain": "How much likelier winners became than under the reference.",
    "loser_gain": "How much likelier losers became than under the reference; falling with the winners' is a warning.",
    "z_ref": "Gain over the reference that counts as neutral (KTO).",
    "liked_gain": "How much likelier liked samples became than under the reference.",
    "disliked_gain": "How much likelier disliked samples became than under the reference.",
    "ratio/mean": "Mean probability ratio of the new to the sampling weights; stays near 1.",
    "ratio/max_abs_dev": "Largest |ratio - 1| at the step's first update: exactly 0 when sampler and learner agree.",
    "clip_fraction": "Share of ratios outside the clip range, whose gradient is cut; above 0.5 updates are too large.",
    "clip_fraction_high": "Share of ratios above the clip range.",
    "clip_fraction_low": "Share of ratios below the clip range.",
    "grad_norm": "Length of the gradient before it is clipped; a sudden tenfold rise means trouble.",
    "grad_rms": "Root mean square of one parameter's gradient; must stay well above the optimizer's eps.",
    "diversity": "Distance between this step's images of one prompt, over that of the base, step 0.",
    "staleness": "Versions between the weights that sampled and the weights being updated; 0 is on-policy.",
    "images": "Images generated for training since the start of the run.",
    "images_per_s": "Training images a second, over time/step_s.",
    "time/step_s": "Seconds of the step, without evaluation and checkpoint.",
    "time/rollout_s": "Seconds the samplers were generating, all samplers together.",
    "time/reward_s": "Seconds the scorers were scoring, all scorers together.",
    "time/update_s": "Seconds the learner was computing losses and gradients, all ranks together.",
    "time/publish_s": "Seconds spent on handing new weights to the samplers, all workers together.",
    "time/idle/<role>_s": "Seconds of the step in which a worker of this role had nothing to do, mean over them.",
    "time/driver_s": "Seconds of the step in which the loop itself was at work and waited for no worker.",
    "time/eval_s": "Seconds of held-out evaluation.",
    "time/eval_final_s": "Seconds of the last held-out evaluation, of the finished weights.",
    "runtime/busy/<role>": "Share of the step in which the workers of this role were busy, mean over them.",
    "runtime/busy/<role>/min": "The same of the one that idled most.",
    "runtime/busy/<role>/max": "The same of the one that idled least.",
    "runtime/workers/<role>": "Workers of this role that are up.",
    "runtime/restarts/<role>": "Workers of this role that were replaced since the run was last started.",
    "runtime/reissued": "Calls issued again since the run was last started, for their worker or their node died.",
    "runtime/bytes_in_flight": "Bytes of trajectories and images on their way.",
    "runtime/<metric>": "About the machine, not about learning.",
}
"""Names with <...> stand for any word there; exact names come before patterns, longer patterns before shorter ones."""


def explain(name: str, more: Mapping[str, str] | None = None) -> str | None:
    """The sentence for a metric's name; ``more`` are sentences of an algorithm's or a reward's own metrics."""
    known = {**METRICS, **(more or {})}
    if name in known:
        return known[name]
    patterns = sorted((key for key in known if "<" in key), key=len, reverse=True)
    return next((known[pattern] for pattern in patterns if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    """<metric> and <detail> reach over slashes, other words do not."""
    regex = re.escape(pattern).replace("<metric>", ".+").replace("<detail>", ".+")
    return re.fullmatch(re.sub(r"<\w+>", "[^/]+", regex), name) is not None
