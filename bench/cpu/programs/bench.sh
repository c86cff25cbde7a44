# Arithmetic of the shell, then programs one after the other.
i=0
sum=0
while [ $i -lt 20000 ]; do
  sum=$((sum + i * 3 % 7))
  i=$((i + 1))
done
[ $sum = 59997 ] || exit 1
i=0
while [ $i -lt 40 ]; do
  /bin/busybox true || exit 1
  i=$((i + 1))
done
