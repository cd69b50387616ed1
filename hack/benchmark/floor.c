/*
 * The floor under a pod's start: one sequential program that makes what every Linux container runtime has to make, and
 * nothing else: no API, no state, no image store, no log, no supervision, no recovery.
 *
 * Per pod: network, ipc and uts namespaces with a hostname and a pin; a veth pair in a bridge, addresses and a route;
 * pod and container cgroups with limits and device rules in every hierarchy; pid, mount and cgroup namespaces; an
 * overlay, proc, sysfs, devpts, mqueue, shm and cgroup mounts, device nodes, three file binds, masked and read-only
 * paths, pivot_root; bounding set, capabilities, no_new_privs, a seccomp filter; execve.
 *
 *   floor LOWERDIR WORKDIR CGROUP      LOWERDIR holds /bin/floor, a static copy of this program
 *   stdin:  one line per cycle         stdout: "start_ns exec_ns stop_ns cpu_ns" per cycle
 *   floor wait | floor true            what the "container" and the exec in it run
 *
 * The bridge lives in a network namespace of the program's own; mounts start from the caller's mount namespace, so
 * that their number costs here what it costs there. Needs root. Numbered steps follow the handshake in run().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/veth.h>
#include <arpa/inet.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MUST(call) ({ long must_ = (long)(call); if (must_ < 0) { fprintf(stderr, "floor: line %d: %s: %s\n", \
                      __LINE__, #call, strerror(errno)); _exit(1); } must_; })
#define PATH 512
#define HIERARCHIES 16
#define ARRAY(a) (sizeof(a) / sizeof *(a))

static const char *lower, *work, *group;
static char hierarchy[HIERARCHIES][PATH];
static int hierarchies, unified, bridge, rtnl;
static unsigned serial;

static char *fmt(char out[PATH], const char *format, ...) __attribute__((format(printf, 2, 3)));
static char *fmt(char out[PATH], const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(out, PATH, format, args);
	va_end(args);
	return out;
}

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long cpu(int who)
{
	struct rusage r;
	getrusage(who, &r);
	return (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1000000000LL + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1000LL;
}

static int put(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	long n = fd < 0 ? -1 : write(fd, value, strlen(value));
	if (fd >= 0)
		close(fd);
	return n < 0 ? -1 : 0;
}

static void get(const char *path, char out[PATH])
{
	int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	long n = MUST(read(fd, out, PATH - 1));
	out[n] = 0;
	close(fd);
}

/* ---- network: rtnetlink packed by hand ---- */

struct message { char data[1024]; size_t size; };

static void *extend(struct message *m, size_t size)
{
	void *at = m->data + m->size;
	memset(at, 0, NLMSG_ALIGN(size));
	m->size += NLMSG_ALIGN(size);
	return at;
}

static struct nlmsghdr *begin(struct message *m, int type, int flags)
{
	struct nlmsghdr *h = extend(m, sizeof *h);
	h->nlmsg_type = type;
	h->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
	return h;
}

static void end(struct message *m, struct nlmsghdr *h) { h->nlmsg_len = m->data + m->size - (char *)h; }

static struct rtattr *attr(struct message *m, int type, const void *value, size_t size)
{
	struct rtattr *a = extend(m, sizeof *a + size);
	a->rta_type = type;
	a->rta_len = sizeof *a + size;
	if (size)
		memcpy(RTA_DATA(a), value, size);
	return a;
}

static void nest(struct message *m, struct rtattr *a) { a->rta_len = m->data + m->size - (char *)a; }

static void link_up(struct message *m, int index)
{
	struct nlmsghdr *h = begin(m, RTM_NEWLINK, 0);
	struct ifinfomsg *i = extend(m, sizeof *i);
	i->ifi_index = index;
	i->ifi_flags = i->ifi_change = IFF_UP;
	end(m, h);
}

static void address(struct message *m, int index, unsigned ip)
{
	struct nlmsghdr *h = begin(m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
	struct ifaddrmsg *a = extend(m, sizeof *a);
	ip = htonl(ip);
	*a = (struct ifaddrmsg){.ifa_family = AF_INET, .ifa_prefixlen = 16, .ifa_index = index};
	attr(m, IFA_LOCAL, &ip, 4);
	attr(m, IFA_ADDRESS, &ip, 4);
	end(m, h);
}

static void route(struct message *m, int index, unsigned gateway)
{
	struct nlmsghdr *h = begin(m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
	struct rtmsg *r = extend(m, sizeof *r);
	gateway = htonl(gateway);
	*r = (struct rtmsg){.rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC, .rtm_type = RTN_UNICAST};
	attr(m, RTA_GATEWAY, &gateway, 4);
	attr(m, RTA_OIF, &index, 4);
	end(m, h);
}

/* Sends the messages in one go and waits for their acknowledgements. */
static void talk(int fd, struct message *m, int acks)
{
	char answer[8192];
	MUST(send(fd, m->data, m->size, 0));
	while (acks > 0) {
		int n = MUST(recv(fd, answer, sizeof answer, 0));
		for (struct nlmsghdr *h = (void *)answer; NLMSG_OK(h, (unsigned)n); h = NLMSG_NEXT(h, n), acks--) {
			errno = -((struct nlmsgerr *)NLMSG_DATA(h))->error;
			MUST(errno ? -1 : 0);
		}
	}
}

static void make_bridge(void)
{
	struct message m = {.size = 0};
	MUST(unshare(CLONE_NEWNET));
	rtnl = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
	struct nlmsghdr *h = begin(&m, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
	struct ifinfomsg *i = extend(&m, sizeof *i);
	i->ifi_flags = i->ifi_change = IFF_UP;
	attr(&m, IFLA_IFNAME, "floor0", 7);
	struct rtattr *info = attr(&m, IFLA_LINKINFO, NULL, 0);
	attr(&m, IFLA_INFO_KIND, "bridge", 7);
	nest(&m, info);
	end(&m, h);
	talk(rtnl, &m, 1);
	bridge = if_nametoindex("floor0");
	m.size = 0;
	address(&m, bridge, 0x0aff0001);
	talk(rtnl, &m, 1);
}

static void make_veth(int netns)
{
	struct message m = {.size = 0};
	char name[16];
	snprintf(name, sizeof name, "f%u", serial);
	struct nlmsghdr *h = begin(&m, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
	struct ifinfomsg *i = extend(&m, sizeof *i);
	i->ifi_flags = i->ifi_change = IFF_UP;
	attr(&m, IFLA_IFNAME, name, strlen(name) + 1);
	attr(&m, IFLA_MASTER, &bridge, 4);
	struct rtattr *info = attr(&m, IFLA_LINKINFO, NULL, 0);
	attr(&m, IFLA_INFO_KIND, "veth", 5);
	struct rtattr *data = attr(&m, IFLA_INFO_DATA, NULL, 0);
	struct rtattr *peer = attr(&m, VETH_INFO_PEER, NULL, 0);
	i = extend(&m, sizeof *i);
	i->ifi_index = 2;
	attr(&m, IFLA_IFNAME, "eth0", 5);
	attr(&m, IFLA_NET_NS_FD, &netns, 4);
	nest(&m, peer);
	nest(&m, data);
	nest(&m, info);
	end(&m, h);
	talk(rtnl, &m, 1);
}

/* ---- cgroups: every v1 hierarchy, or the one of v2 ---- */

static void find_hierarchies(void)
{
	char device[PATH], at[PATH], type[PATH];
	FILE *mounts = fopen("/proc/self/mounts", "re");
	while (mounts && fscanf(mounts, "%511s %511s %511s %*[^\n]", device, at, type) == 3) {
		unified |= !strcmp(type, "cgroup2") && !strcmp(at, "/sys/fs/cgroup");
		if (!strncmp(at, "/sys/fs/cgroup", 14) && (!strcmp(type, "cgroup") || unified) && hierarchies < HIERARCHIES) {
			strcpy(hierarchy[unified ? 0 : hierarchies], at);
			hierarchies = unified ? 1 : hierarchies + 1;
		}
	}
	fclose(mounts);
	MUST(hierarchies ? 0 : (errno = ENOENT, -1));
}

static void make_group(const char *name)
{
	char path[PATH], file[PATH], value[PATH];
	for (int i = 0; i < hierarchies; i++) {
		MUST(mkdir(fmt(path, "%s%s%s", hierarchy[i], group, name), 0755) < 0 && errno != EEXIST ? -1 : 0);
		for (const char **f = (const char *[]){"cpuset.cpus", "cpuset.mems", NULL}; *f && !unified; f++)
			if (access(fmt(file, "%s/%s", path, *f), F_OK) == 0) {
				char up[PATH];
				get(fmt(up, "%s/../%s", path, *f), value);
				MUST(put(file, value));
			}
	}
}

static void delegate(const char *name)
{
	char file[PATH];
	if (unified)
		MUST(put(fmt(file, "%s%s/cgroup.subtree_control", hierarchy[0], name), "+cpu +memory +pids"));
}

static void remove_group(const char *name)
{
	char path[PATH];
	for (int i = 0; i < hierarchies; i++)
		for (int tries = 0; rmdir(fmt(path, "%s%s%s", hierarchy[i], group, name)) < 0 && errno == EBUSY && tries < 1000; tries++)
			usleep(100);
}

static void allow_all_devices(const char *path)
{
	struct bpf_insn code[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .imm = 1}, {.code = BPF_JMP | BPF_EXIT}};
	union bpf_attr load = {.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insns = (unsigned long)code, .insn_cnt = ARRAY(code),
			       .license = (unsigned long)"GPL"};
	int program = MUST(syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load)), dir = MUST(open(path, O_DIRECTORY | O_CLOEXEC));
	union bpf_attr attach = {.target_fd = dir, .attach_bpf_fd = program, .attach_type = BPF_CGROUP_DEVICE};
	MUST(syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof attach));
	close(program);
	close(dir);
}

static void limit(const char *name)
{
	static const char *const one[][2] = {{"cpu.shares", "102"}, {"cpu.cfs_period_us", "100000"}, {"cpu.cfs_quota_us", "100000"},
		{"memory.limit_in_bytes", "268435456"}, {"pids.max", "1024"}, {"devices.deny", "a"}, {"devices.allow", "c *:* m"},
		{"devices.allow", "b *:* m"}, {"devices.allow", "c 1:3 rwm"}, {"devices.allow", "c 1:5 rwm"},
		{"devices.allow", "c 1:7 rwm"}, {"devices.allow", "c 1:8 rwm"}, {"devices.allow", "c 1:9 rwm"},
		{"devices.allow", "c 5:0 rwm"}, {"devices.allow", "c 5:1 rwm"}, {"devices.allow", "c 5:2 rwm"},
		{"devices.allow", "c 136:* rwm"}};
	static const char *const two[][2] = {{"cpu.weight", "4"}, {"cpu.max", "100000 100000"}, {"memory.max", "268435456"}, {"pids.max", "1024"}};
	char file[PATH];
	size_t count = unified ? ARRAY(two) : ARRAY(one);
	for (size_t n = 0; n < count; n++) {
		const char *const *rule = unified ? two[n] : one[n];
		for (int i = 0; i < hierarchies; i++)
			if (access(fmt(file, "%s%s%s/%s", hierarchy[i], group, name, rule[0]), F_OK) == 0) {
				MUST(put(file, rule[1]));
				break;
			}
	}
	if (unified)
		allow_all_devices(fmt(file, "%s%s%s", hierarchy[0], group, name));
}

/* v1: "0" into tasks moves the caller without the global lock that cgroup.procs takes, whose first taker after a quiet
 * while waits for an RCU grace period (10 ms and more). v2 clones into the cgroup. */
static void join(const char *name)
{
	char file[PATH];
	for (int i = 0; i < hierarchies; i++)
		MUST(put(fmt(file, "%s%s%s/tasks", hierarchy[i], group, name), "0"));
}

/* ---- the end of a start: capabilities and a filter of the size and shape of a default profile ---- */

static int tree(struct sock_filter *out, int first, int last)
{
	if (last - first <= 4) {
		int n = 0;
		for (int nr = first; nr < last; nr++, n += 2) {
			out[n] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
			out[n + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, nr % 8 == 7 && nr > 160 && nr < 256
								  ? SECCOMP_RET_ERRNO | EPERM : SECCOMP_RET_ALLOW);
		}
		out[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
		return n;
	}
	int middle = (first + last) / 2, left = tree(out + 2, first, middle);
	out[0] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, middle, 0, 1);
	out[1] = (struct sock_filter)BPF_STMT(BPF_JMP | BPF_JA, left);
	return 2 + left + tree(out + 2 + left, middle, last);
}

static void confine(void)
{
#ifdef __aarch64__
	const unsigned arch = AUDIT_ARCH_AARCH64;
#else
	const unsigned arch = AUDIT_ARCH_X86_64;
#endif
	static const int kept[] = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31};
	static struct sock_filter code[BPF_MAXINSNS];
	unsigned mask = 0;
	for (size_t i = 0; i < ARRAY(kept); i++)
		mask |= 1u << kept[i];
	for (int cap = 0; cap <= CAP_LAST_CAP; cap++)
		if (cap > 31 || !(mask & 1u << cap))
			prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {{.effective = mask, .permitted = mask}};
	MUST(syscall(SYS_capset, &header, data));
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
	code[1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, arch, 1, 0);
	code[2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[3] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	struct sock_fprog program = {.len = 4 + tree(code + 4, 0, 470), .filter = code};
	MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

/* ---- the container's root ---- */

static void bind_ro(const char *source, const char *target)
{
	MUST(mount(source, target, NULL, MS_BIND | MS_REC, NULL));
	MUST(mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
}

static void mount_groups(const char *name)
{
	char to[PATH], from[PATH];
	if (unified) {
		MUST(mount("cgroup", "sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL));
		return;
	}
	MUST(mount("tmpfs", "sys/fs/cgroup", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755"));
	for (int i = 0; i < hierarchies; i++) {
		MUST(mkdir(fmt(to, "sys/fs/cgroup%s", strrchr(hierarchy[i], '/')), 0755));
		bind_ro(fmt(from, "%s%s%s", hierarchy[i], group, name), to);
	}
}

static void make_root(const char *container)
{
	static const struct { const char *name; int major, minor; } nodes[] = {{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7},
		{"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
	static const char *const links[][2] = {{"/proc/self/fd", "dev/fd"}, {"/proc/self/fd/0", "dev/stdin"}, {"/proc/self/fd/1", "dev/stdout"},
		{"/proc/self/fd/2", "dev/stderr"}, {"pts/ptmx", "dev/ptmx"}, {"/proc/kcore", "dev/core"}};
	static const char *const files[] = {"hosts", "hostname", "resolv.conf"};
	static const char *const masked[] = {"proc/acpi", "proc/asound", "proc/kcore", "proc/keys", "proc/latency_stats", "proc/timer_list",
		"proc/timer_stats", "proc/sched_debug", "proc/scsi", "sys/firmware", "sys/devices/virtual/powercap"};
	static const char *const readonly[] = {"proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"};
	const unsigned long quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC;
	char root[PATH], options[3 * PATH], from[PATH], to[PATH];
	struct stat st;

	MUST(mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL));
	fmt(root, "%s/root", work);
	snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/%u/upper,workdir=%s/%u/work", lower, work, serial, work, serial);
	MUST(mount("overlay", root, "overlay", 0, options));
	MUST(chdir(root));
	MUST(mount("proc", "proc", "proc", quiet, NULL));
	MUST(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"));
	for (const char **dir = (const char *[]){"dev/pts", "dev/mqueue", "dev/shm", NULL}; *dir; dir++)
		MUST(mkdir(*dir, 0755));
	MUST(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"));
	MUST(mount("mqueue", "dev/mqueue", "mqueue", quiet, NULL));
	MUST(mount("shm", "dev/shm", "tmpfs", quiet, "mode=1777,size=65536k"));
	MUST(mount("sysfs", "sys", "sysfs", quiet | MS_RDONLY, NULL));
	mount_groups(container);
	for (size_t i = 0; i < ARRAY(nodes); i++)
		MUST(mknod(fmt(to, "dev/%s", nodes[i].name), S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)));
	for (size_t i = 0; i < ARRAY(links); i++)
		MUST(symlink(links[i][0], links[i][1]));
	for (size_t i = 0; i < ARRAY(files); i++) {
		close(MUST(open(fmt(to, "etc/%s", files[i]), O_CREAT | O_WRONLY | O_CLOEXEC, 0644)));
		MUST(mount(fmt(from, "%s/%s", work, files[i]), to, NULL, MS_BIND, NULL));
	}
	for (size_t i = 0; i < ARRAY(masked); i++)
		if (stat(masked[i], &st) == 0)
			MUST(S_ISDIR(st.st_mode) ? mount("tmpfs", masked[i], "tmpfs", MS_RDONLY, "size=0k") : mount("dev/null", masked[i], NULL, MS_BIND, NULL));
	for (size_t i = 0; i < ARRAY(readonly); i++)
		if (stat(readonly[i], &st) == 0)
			bind_ro(readonly[i], readonly[i]);
	MUST(syscall(SYS_pivot_root, ".", "."));
	MUST(umount2(".", MNT_DETACH));
	MUST(chdir("/"));
}

static void finish(char *program)
{
	MUST(setsid());
	umask(022);
	syscall(SYS_close_range, 3u, ~0u, 4 /* CLOEXEC */);
	confine();
	execve("/bin/floor", (char *[]){"floor", program, NULL}, (char *[]){"PATH=/bin", NULL});
	MUST(-1);
}

static long clone3(unsigned long long flags, int *pidfd, int cgroup)
{
	struct clone_args args = {.flags = flags, .pidfd = (unsigned long)pidfd, .exit_signal = SIGCHLD, .cgroup = cgroup};
	return MUST(syscall(SYS_clone3, &args, sizeof args));
}

/* ---- the pod's process: namespaces, then the container, then orders: 'e'xec, 'k'ill ---- */

static void wait_eof(int fd)
{
	char byte;
	MUST(read(fd, &byte, 1));
	close(fd);
}

static void pod(int orders, const char *container)
{
	char path[PATH], order;
	int eof[2], pidfd, cgroup = -1, own_pid, own = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
	struct message m = {.size = 0};

	MUST(prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0));
	MUST(sethostname("floor", 5));
	MUST(write(orders, "r", 1));                                          /* 2: namespaces are there */
	MUST(read(orders, &order, 1));                                        /* 5: the veth is there */
	link_up(&m, 1);
	link_up(&m, 2);
	address(&m, 2, 0x0aff0002 + serial % 60000);
	route(&m, 2, 0x0aff0001);
	talk(own, &m, 4);
	make_group(container);
	limit(container);
	MUST(pipe2(eof, O_CLOEXEC));
	if (unified)
		cgroup = MUST(open(fmt(path, "%s%s%s", hierarchy[0], group, container), O_DIRECTORY | O_CLOEXEC));
	unsigned long long flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_PIDFD | (unified ? CLONE_INTO_CGROUP : 0);
	pid_t init = clone3(flags, &pidfd, cgroup);
	if (init == 0) {
		if (!unified)
			join(container);
		MUST(unshare(CLONE_NEWCGROUP));
		make_root(container);
		finish("wait");
	}
	close(eof[1]);
	wait_eof(eof[0]);
	MUST(write(orders, "d", 1));                                          /* 6: exec succeeded */
	own_pid = MUST(open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC));
	while (MUST(read(orders, &order, 1)) == 1 && order == 'e') {
		int execfd, status;
		MUST(setns(pidfd, CLONE_NEWPID));
		pid_t child = clone3(CLONE_PIDFD | (unified ? CLONE_INTO_CGROUP : 0), &execfd, cgroup);
		if (child == 0) {
			if (!unified)
				join(container);
			MUST(setns(pidfd, CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET));
			finish("true");
		}
		MUST(setns(own_pid, CLONE_NEWPID));
		MUST(waitpid(child, &status, 0));
		MUST(status ? -1 : 0);
		close(execfd);
		MUST(write(orders, "d", 1));
	}
	MUST(syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0));
	MUST(waitpid(init, NULL, 0));
	_exit(0);
}

static int unlink_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type, (void)ftw;
	return remove(path);
}

static void order(int fd, char byte)
{
	MUST(write(fd, &byte, 1));
	MUST(read(fd, &byte, 1) == 1 ? 0 : (errno = EPIPE, -1));
}

static void run(void)
{
	char pods[PATH], container[PATH], pin[PATH], from[PATH], byte;
	int pair[2], netns;
	long long begin = now(), spent = cpu(RUSAGE_SELF) + cpu(RUSAGE_CHILDREN), started, executed;

	serial++;
	fmt(pods, "/%u", serial);
	fmt(container, "/%u/c", serial);
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	pid_t child = clone3(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS, NULL, 0);   /* 1: the pod's process */
	if (child == 0) {
		close(pair[0]);
		pod(pair[1], container);
	}
	close(pair[1]);
	make_group(pods);
	delegate(fmt(from, "%s%s", group, pods));
	for (const char **dir = (const char *[]){"", "/upper", "/work", NULL}; *dir; dir++)
		MUST(mkdir(fmt(from, "%s/%u%s", work, serial, *dir), 0755));
	MUST(read(pair[0], &byte, 1) == 1 ? 0 : -1);
	netns = MUST(open(fmt(from, "/proc/%d/ns/net", child), O_RDONLY | O_CLOEXEC));
	close(MUST(open(fmt(pin, "%s/%u/net", work, serial), O_CREAT | O_WRONLY | O_CLOEXEC, 0444)));
	MUST(mount(from, pin, NULL, MS_BIND, NULL));                          /* 3: the pin */
	make_veth(netns);                                                     /* 4: the veth */
	close(netns);
	order(pair[0], 'v');
	started = now();
	order(pair[0], 'e');
	executed = now();
	MUST(write(pair[0], "k", 1));
	MUST(waitpid(child, NULL, 0));
	close(pair[0]);
	MUST(umount2(pin, MNT_DETACH));
	remove_group(container);
	remove_group(pods);
	nftw(fmt(from, "%s/%u", work, serial), unlink_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
	printf("%lld %lld %lld %lld\n", started - begin, executed - started, now() - executed,
	       cpu(RUSAGE_SELF) + cpu(RUSAGE_CHILDREN) - spent);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	char path[PATH], line[16];
	if (argc == 2)
		return strcmp(argv[1], "wait") ? 0 : pause();
	if (argc != 4)
		return fprintf(stderr, "usage: floor LOWERDIR WORKDIR CGROUP\n"), 2;
	lower = argv[1], work = argv[2], group = argv[3];
	find_hierarchies();
	make_bridge();
	make_group("");
	delegate("");
	delegate(group);
	MUST(mkdir(fmt(path, "%s/root", work), 0755));
	for (const char **file = (const char *[]){"hosts", "hostname", "resolv.conf", NULL}; *file; file++)
		close(MUST(open(fmt(path, "%s/%s", work, *file), O_CREAT | O_WRONLY | O_CLOEXEC, 0644)));
	while (fgets(line, sizeof line, stdin))
		run();
	remove_group("");
	return 0;
}
