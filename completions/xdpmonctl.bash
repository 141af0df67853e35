# Completion of xdpmonctl for bash. It needs no helper functions, and starts no process.

_xdpmonctl() {
    local values=' --json --color --bus --for --reason --from-file --interface --confirm --by --limit --port --proto --prefix-len --prefix-len6 --address '
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} command='' option='' index name
    COMPREPLY=()

    # bash breaks words at "=", so that --json=short arrives as three.
    if [[ $word == '=' ]]; then
        option=$previous word=''
    elif [[ $previous == '=' ]]; then
        option=${COMP_WORDS[COMP_CWORD - 2]}
    elif [[ $values == *" $previous "* ]]; then
        option=$previous
    fi

    # The command is the first word that is neither an option nor the value of one.
    for ((index = 1; index < COMP_CWORD; index++)); do
        name=${COMP_WORDS[index]}
        if [[ $name == -* ]]; then
            [[ $values == *" $name "* ]] && ((index++))
            [[ ${COMP_WORDS[index]} == '=' ]] && ((index++))
        else
            command=$name
            break
        fi
    done

    if [[ $option ]]; then
        case $option in
            --json) name='short pretty off' ;;
            --color) name='auto always never' ;;
            --by) [[ $command == flows ]] && name='bytes packets' || name='bytes packets syn' ;;
            --prefix-len) name='8 16 24' ;;
            --prefix-len6) name='32 48 64' ;;
            --proto) name='tcp udp icmp icmpv6 sctp' ;;
            --for | --confirm) name='60s 10m 1h 1d' ;;
            --interface) name=$(cd /sys/class/net 2>/dev/null && echo *) ;;
            --from-file)
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -f -- "$word")
                return
                ;;
            *) return ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$name" -- "$word")
        return
    fi

    if [[ $word == -* ]]; then
        name='--json -j --no-legend --color --bus --help -h --version'
        case $command in
            allow | deny) name+=' --for --reason --from-file --force' ;;
            remove | reload) name+=' --force' ;;
            mode) name+=' --interface --confirm --force' ;;
            ports) name+=' --limit --port --proto --local --no-local --interval' ;;
            top) name+=' --by --limit --port --proto --prefix-len --prefix-len6 --local --no-local --interval --resolve --watch' ;;
            flows) name+=' --by --limit --port --proto --address --watch' ;;
            events) name+=' --follow -f --limit' ;;
        esac
    else
        case $command in
            '') name='status allow deny remove list explain mode confirm ports top flows events reload check-config' ;;
            mode) name='monitor enforce default' ;;
            check-config)
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -f -- "$word")
                return
                ;;
            *) return ;;
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$name" -- "$word")
}

complete -F _xdpmonctl xdpmonctl
