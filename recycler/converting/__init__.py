"""What is no LoRA becomes one."""
