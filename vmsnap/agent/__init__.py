"""The agent: vmsnap as a service beside the hypervisor. Schedules, jobs, the API, metrics and the page.

What to run next is decided by `deciding`, which is pure; `loop` carries it out. Jobs run in processes of their own and
write what came of them into the host's database themselves, so that an agent that dies loses none.
"""
