"""Property tests here are judged by what they find, never by how long they take: this machine may be busy."""

from hypothesis import HealthCheck, settings

settings.register_profile("xdpmond", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xdpmond")
