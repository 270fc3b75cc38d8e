"""Context extension after LongLoRA: fine-tune with shifted sparse attention, evaluate dense, compare."""
