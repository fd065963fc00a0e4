"""What every loop needs and no algorithm owns."""

import logging

# Imported by peft, it regrets on every command that it cannot fetch optional CPU kernels from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
