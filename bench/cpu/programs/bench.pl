# Regular expressions, hashes and sorting.
my $text = join ' ', map { "word" . ($_ * 7919 % 3001) } 1 .. 30000;
my %count;
$count{$1}++ while $text =~ /(\w+?)(?:\s|$)/g;
my @order = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
(my $other = $text) =~ s/(\d)(\d)/$2$1/g;
my $sum = 0;
$sum += ord($_) for split //, substr($other, 0, 50000);
my $result = join ' ', scalar(@order), $order[0], length($other), $sum;
die "the result is $result" if $result ne '3001 word1 258905 3851437';
