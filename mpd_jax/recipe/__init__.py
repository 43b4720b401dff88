"""The concept: a recipe is four answers. Who writes, who rewrites, which target, which loss.

| method | write | rewrite | target (weights / context) | loss | config |
|---|---|---|---|---|---|
| MPD (2605.08776) | student | compress by teacher | teacher / plain | reverse_kl | `mpd.yaml` |
| MPD of all weights | student | compress by teacher | teacher / plain | reverse_kl | `mpd_full.yaml` |
| its On-Policy (C) | student | compress by student | teacher / plain | reverse_kl | `on_policy_self_compressed.yaml` |
| its Off-Policy (C) | teacher | compress by teacher | teacher / plain | forward_kl | `off_policy_compressed.yaml` |
| on-policy distillation | student | nobody | teacher / plain | reverse_kl | `on_policy.yaml` |
| off-policy distillation | teacher | nobody | teacher / plain | forward_kl | `off_policy.yaml` |
| sequence-level KD | teacher | nobody | none | cross_entropy | `sequence_kd.yaml` |
| SFT | dataset | nobody | none | cross_entropy | `sft.yaml` |
| CRISP, first named OPSDC (2603.05433) | student | nobody | self_refreshed(50) / concise | reverse_kl | `crisp.yaml` |
| OPSD (2601.18734) | student | nobody | self_frozen / privileged | forward_kl | `opsd.yaml` |
| TRD (2606.08432) | student | repair by teacher | teacher / rewrite | forward_kl | `trd.yaml` |
| Compress-Distill | teacher | compress by a third model, original_correct | none | cross_entropy | `compress_distill.yaml` |
| its truncation control | teacher | truncate, correct | none | cross_entropy | `compress_distill_truncation.yaml` |
| its raw arm | teacher | nobody, correct | none | cross_entropy | `compress_distill_raw.yaml` |
| its answer-only arm | teacher | truncate to 0, correct | none | cross_entropy | `compress_distill_answer_only.yaml` |

A method is a row, not a class. What no row names and `recipe.validate` does not refuse simply works.
"""
