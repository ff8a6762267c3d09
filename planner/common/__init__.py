"""What every package of the planner uses: errors, units, schemas, phases and tiers, files, machine probes."""
