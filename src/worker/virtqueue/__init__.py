"""How the guest's buffers reach us: memory regions, descriptor chains, rings."""
