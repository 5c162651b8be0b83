"""A federation of organisations: who belongs to it, and the network between them, over NVFlare.

NVFlare is used for identity, encryption and connections only. No NVFlare job is ever accepted: its jobs bring code.
"""
