"""What every loop needs and no algorithm owns."""

import logging

# As peft imports them they tell of what nobody here misses: kernels that are not built or would come from the hub, and
# torchao's use of torch.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
