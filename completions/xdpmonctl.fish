# Completion of xdpmonctl for fish.

set -l commands status allow deny remove list explain mode confirm ports top flows events reload check-config

complete -c xdpmonctl -f

complete -c xdpmonctl -l json -x -a 'short pretty off' -d 'JSON output'
complete -c xdpmonctl -s j -d 'The same as --json=short'
complete -c xdpmonctl -l no-legend -d 'No table headers, hints and closing lines'
complete -c xdpmonctl -l color -x -a 'auto always never' -d 'Colours'
complete -c xdpmonctl -l bus -x -d 'The message bus to use'
complete -c xdpmonctl -s h -l help -d 'Show help'
complete -c xdpmonctl -l version -d 'Show the version'

set -l none "not __fish_seen_subcommand_from $commands"
complete -c xdpmonctl -n $none -a status -d 'What is going on'
complete -c xdpmonctl -n $none -a allow -d 'Let sources in'
complete -c xdpmonctl -n $none -a deny -d 'Shut sources out'
complete -c xdpmonctl -n $none -a remove -d 'Take out entries'
complete -c xdpmonctl -n $none -a list -d 'All entries of the policy'
complete -c xdpmonctl -n $none -a explain -d 'What happens to a source'
complete -c xdpmonctl -n $none -a mode -d 'Show or set the mode'
complete -c xdpmonctl -n $none -a confirm -d 'Keep the mode that was set with --confirm'
complete -c xdpmonctl -n $none -a ports -d 'From how many sources each port was reached'
complete -c xdpmonctl -n $none -a top -d 'Who sends the most'
complete -c xdpmonctl -n $none -a flows -d 'Which conversations there are'
complete -c xdpmonctl -n $none -a events -d 'The packets that were reported'
complete -c xdpmonctl -n $none -a reload -d 'Read the configuration again'
complete -c xdpmonctl -n $none -a check-config -d 'Check the configuration'

set -l change '__fish_seen_subcommand_from allow deny'
complete -c xdpmonctl -n $change -l for -x -a '60s 10m 1h 1d' -d 'Until then'
complete -c xdpmonctl -n $change -l reason -x -d 'Kept with the entry'
complete -c xdpmonctl -n $change -l from-file -r -F -d 'Read the prefixes from a file'
complete -c xdpmonctl -n '__fish_seen_subcommand_from allow deny remove mode reload' -l force -d 'Even if it cuts off an SSH connection'

set -l mode '__fish_seen_subcommand_from mode'
complete -c xdpmonctl -n "$mode; and not __fish_seen_subcommand_from monitor enforce default" -a 'monitor enforce default'
complete -c xdpmonctl -n $mode -l interface -x -a '(__fish_print_interfaces)' -d 'On this interface alone'
complete -c xdpmonctl -n $mode -l confirm -x -a '60s 10m' -d 'Go back after this time unless confirmed'

set -l select '__fish_seen_subcommand_from ports top flows'
complete -c xdpmonctl -n $select -l port -x -d 'Only what goes to this port'
complete -c xdpmonctl -n $select -l proto -x -a 'tcp udp icmp icmpv6 sctp' -d 'Only this protocol'
complete -c xdpmonctl -n '__fish_seen_subcommand_from ports top flows events' -l limit -x -d 'So many rows'
complete -c xdpmonctl -n '__fish_seen_subcommand_from ports top' -l local -d 'With sources in private networks'
complete -c xdpmonctl -n '__fish_seen_subcommand_from ports top' -l no-local -d 'Without sources in private networks'
complete -c xdpmonctl -n '__fish_seen_subcommand_from ports top' -l interval -d 'Only the last full window'
complete -c xdpmonctl -n '__fish_seen_subcommand_from top flows' -l watch -d 'A live screen'

set -l top '__fish_seen_subcommand_from top'
complete -c xdpmonctl -n $top -l by -x -a 'bytes packets syn' -d 'Order'
complete -c xdpmonctl -n $top -l prefix-len -x -a '8 16 24' -d 'Sum up IPv4 sources by prefix'
complete -c xdpmonctl -n $top -l prefix-len6 -x -a '32 48 64' -d 'Sum up IPv6 sources by prefix'
complete -c xdpmonctl -n $top -l resolve -d 'Show names by DNS'

set -l flows '__fish_seen_subcommand_from flows'
complete -c xdpmonctl -n $flows -l by -x -a 'bytes packets' -d 'Order'
complete -c xdpmonctl -n $flows -l address -x -d 'Only flows from or to this address'

complete -c xdpmonctl -n '__fish_seen_subcommand_from events' -s f -l follow -d 'Show events as they happen'
complete -c xdpmonctl -n '__fish_seen_subcommand_from check-config' -F
