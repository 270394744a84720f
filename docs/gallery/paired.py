"""
What a difference of two scores is worth
========================================

Two networks scored on the same samples: the interval of their difference is narrower than that of either score.
"""

import numpy as np

from mpsearch.metric import TOP1
from mpsearch.record import pack
from mpsearch.search.compare import paired

# %%
# Two networks that fail on mostly the same 1,000 images.
random = np.random.default_rng(0)
hard = random.random(1000) < 0.12
first = ~hard
second = first.copy()
second[random.choice(np.flatnonzero(first), 9, replace=False)] = False
second[random.choice(np.flatnonzero(hard), 2, replace=False)] = True
print(f"{first.mean():.1%} and {second.mean():.1%}; one has a standard error of {hard.std() / 1000**0.5:.1%}")

# %%
# Compared sample by sample:
difference = paired([pack(second)], [pack(first)], TOP1)
print(difference.show(TOP1), TOP1.difference_unit)
