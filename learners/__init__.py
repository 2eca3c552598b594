"""The torch side: policy models, credit, objectives, packing and the FSDP2 learner."""
