"""GenEval: the rule, the reward, the detector for real images, and a script that writes training prompts."""
